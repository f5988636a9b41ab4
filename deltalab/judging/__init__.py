"""Which of two outputs is better, and how often: AlpacaEval on a live model.

`generation` writes the outputs, `judges` compares them by an endpoint, a local model or likelihood,
`annotations` turns verdicts into win rates, raw and length-controlled.
"""
