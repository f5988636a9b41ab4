r"""Text from elsewhere as people and programs get to see it: one function for every medium.

Records, cards, configs, names of files and messages come from anyone. What is read passes `line` or
`name` at the door, so that it is plain text of bounded length. Each medium adds what it alone takes
for more than text: Markdown, HTML, spreadsheets and names of files here, the markup of rich in
`deltalab.terminal.console`, what a terminal's encoding lacks in `deltalab.terminal.commands`.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

NAME, MESSAGE, FILE = 200, 2000, 120
"""Longest name and longest message, in characters; longest name of a file, in bytes."""
_MARKUP = re.compile(r"[\\`*\[\]|]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|(?<!\w)_|_(?!\w)|~(?=~)")
_ENTITIES = {"<": "&lt;", "&": "&amp;"}


def line(text: Any) -> str:
    r"""Return a text as one line in which every sign is printed, for a terminal or a log.

    White space is a space. Codes of terminals, signs that turn the direction of writing and halves
    of signs are written as in Python.

    >>> line("a\x1b[2J\n\u202eb")
    'a\\x1b[2J \\u202eb'
    """
    own = str(text)
    if own.isprintable():
        return own
    return "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in own)


def lines(text: str) -> str:
    """Return a text of our own in which every line is a `line`."""
    return "\n".join(map(line, text.split("\n")))


def name(text: Any, most: int = NAME) -> str:
    """Return a text as a line of `most` characters, of a longer one its beginning and a digest.

    >>> name("x" * 5000, 20)
    'xxxxxxxxxx…-c59d3c04'
    """
    whole = line(text)
    return whole if len(whole) <= most else f"{whole[: most - 10]}…-{_digest(whole)}"


def within(value: Any, most: int = NAME) -> Any:
    """Return nested data of JSON in which every text, also as a key, is a `name`."""
    if isinstance(value, str):
        return name(value, most)
    if isinstance(value, Mapping):
        return {name(key, most): within(each, most) for key, each in value.items()}
    return [within(each, most) for each in value] if isinstance(value, list | tuple) else value


def markdown(text: Any) -> str:
    r"""Return a text as one line of Markdown that shows it, also within a table.

    >>> markdown("<script> | [a](b) x_y p<0.1"), markdown("a_ ~~b~~ &lt;")
    ('&lt;script> \\| \\[a\\](b) x_y p<0.1', 'a\\_ \\~~b\\~~ &amp;lt;')
    """
    return _MARKUP.sub(lambda found: _ENTITIES.get(found[0], f"\\{found[0]}"), line(text))


def html(value: Any) -> Any:
    """Return what a template that escapes shows: text as a line; markup and numbers stay."""
    return line(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def cell(value: Any) -> Any:
    """Return a cell of a CSV file: a text that a spreadsheet would compute begins with a quote.

    >>> cell("=1+1"), cell("-x"), cell(-1.5)
    ("'=1+1", "'-x", -1.5)
    """
    if not isinstance(value, str):
        return value
    text = line(value)
    return f"'{text}" if text.lstrip()[:1] in tuple("=+-@") else text


def stem(text: str) -> str:
    """Return the name of a file, of a very long text its beginning and a digest of all of it.

    >>> stem("fig/2 again")
    'fig-2-again'
    >>> stem("x" * 300)
    'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx-0d4e2ca9'
    """
    plain = re.sub(r"[^\w.-]+", "-", text)
    whole = plain.encode(errors="replace")
    return plain if len(whole) <= FILE else f"{whole[:80].decode(errors='ignore')}-{_digest(plain)}"


def folder(text: str) -> str:
    """Return a name of a file from which `unquote` gives the text, if that is not too long.

    >>> folder("a/b"), folder(".."), len(folder("x" * 300))
    ('a%2Fb', '%2E%2E', 89)
    """
    found = quote(text, safe="", errors="replace")
    found = found.replace(".", "%2E") if not found.strip(".") else found
    return found if len(found) <= FILE else f"{found[:80]}-{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:8]
