"""What a language model says, and what it is worth: AlpacaEval and safety on a live model.

`generation` writes the outputs, `judges` compares them by an endpoint, a local model or likelihood,
`annotations` turns verdicts into win rates, raw and length-controlled. `safety` tells refusals from
answers.
"""
