"""What a point or a sweep would cost, without running it: `plan=true`.

`planning` tells memory from shapes, `hours` GPU hours by `estimates.yaml`, `preview` both in text.
"""
