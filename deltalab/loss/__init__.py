"""The change of the loss: measured, approximated by the term, and predicted.

Objectives (`objectives`, `answers`), passes over a model (`passes`), the term (`quadrature`,
`riemann`, `lines`), its prediction (`prediction`), all for one pair (`engine`).
"""
