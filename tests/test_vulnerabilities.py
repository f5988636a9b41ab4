"""What `make audit` says: of vulnerabilities, and in one line where nobody can tell any."""

import json
import re
from types import SimpleNamespace

import pytest

from experiments import audit

FINE = {"name": "a", "version": "1", "vulns": []}
BAD = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}


@pytest.mark.parametrize(
    ("found", "lines", "code"),
    [
        ([FINE], ["audit: no known vulnerability in 1 packages"], 0),
        (
            [FINE, BAD],
            ["b 2: CVE-1, mended in 3", "audit: 1 known vulnerabilities in 2 packages"],
            1,
        ),
        ([{"name": "a", "skip_reason": "unknown"}], ["audit: not done, the package index here"], 0),
        (None, ["audit: not done, no package index can be reached"], 0),
    ],
)
def test_what_is_said(found, lines, code, monkeypatch, capsys):
    text = "Traceback ..." if found is None else json.dumps({"dependencies": found})
    monkeypatch.setattr("subprocess.run", lambda *_, **__: SimpleNamespace(stdout=text))
    assert audit.main() == code
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(lines)
    assert all(one.startswith(line) for one, line in zip(said, lines, strict=True))


def test_every_pin_has_hashes_and_the_file_names_no_index():
    text = audit.PINS.read_text(encoding="utf-8")
    pins = re.split(r"^(?=\w)", text, flags=re.MULTILINE)[1:]
    assert len(pins) > 100
    for pin in pins:
        assert re.match(r"[\w.-]+==\S+ \\\n", pin), pin
        assert pin.count("--hash=sha256:") == pin.count("\n    ") > 0, pin
    assert "://" not in text
