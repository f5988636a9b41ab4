"""The two libraries that make the page alive, as one file carries them.

Vega-Lite (BSD-3-Clause) draws the scatter, DataTables (MIT) sorts and searches tables. They come
out of Python packages, so that nothing is fetched when the page is written or read.
"""

import base64
import gzip
import hashlib
from functools import cache
from importlib.resources import files
from importlib.util import find_spec

NEEDED = {"jinja2": "jinja2", "itables": "itables", "vl_convert": "vl-convert-python"}


def missing() -> list[str]:
    """Return the packages that the page needs and that are not installed."""
    return [package for module, package in NEEDED.items() if find_spec(module) is None]


@cache
def vega() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script, packed."""
    import vl_convert

    return packed(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


@cache
def datatables() -> str:
    """Return DataTables with its jQuery as one module, packed."""
    return packed(files("itables").joinpath("html/dt_bundle.js").read_text(encoding="utf-8"))


def packed(script: str) -> str:
    """Compress a script into text that is safe inside HTML, the same bytes every time.

    >>> gzip.decompress(base64.b64decode(packed("let a;"))).decode()
    'let a;'
    """
    return base64.b64encode(gzip.compress(script.encode(), 9, mtime=0)).decode()


def digest(script: str) -> str:
    """Name an inline script in a content security policy, which then runs it and no other.

    >>> digest("")
    "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='"
    """
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
