"""Linear algebra on matrices that are given: factors, columns fixed in turn, heads in closed form.

Nothing here knows of models or files. `factor` has the singular value decomposition, `columnwise`
the one solver for whatever decides columns one after another, `heads` classifiers on features.
"""
