"""`make audit`: known vulnerabilities of the pinned packages, where a package index tells them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PINS = Path(__file__).parents[1] / "constraints.txt"


def told(found: list[dict[str, Any]]) -> tuple[list[str], int]:
    """Return what to say of the packages that pip-audit has looked up, and the exit code.

    >>> told([{"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "?"}])
    (['audit: no known vulnerability in 1 of 2 packages; the index does not know the others'], 0)
    """
    known = [one for one in found if "vulns" in one]
    if not known:
        return ["audit: not done, the package index here knows nothing of vulnerabilities"], 0
    bad = [
        f"{one['name']} {one['version']}: {each['id']}, mended in"
        f" {', '.join(each.get('fix_versions') or ['no version yet'])}"
        for one in known
        for each in one["vulns"]
    ]
    count = f"{len(known)} of {len(found)} packages" if known != found else f"{len(found)} packages"
    rest = "; the index does not know the others" if known != found else ""
    what = f"{len(bad)} known vulnerabilities" if bad else "no known vulnerability"
    return [*bad, f"audit: {what} in {count}{rest}"], int(bool(bad))


def main() -> int:
    """Look all pins up and say what was found; 1 where there is a vulnerability."""
    tool = [str(Path(sys.executable).with_name("uv")), "tool", "run", "-q", "pip-audit"]
    how = ["--no-deps", "--disable-pip", "-f", "json", "--progress-spinner", "off"]
    run = subprocess.run([*tool, "-r", str(PINS), *how], capture_output=True, text=True)
    try:
        lines, code = told(json.loads(run.stdout)["dependencies"])
    except (ValueError, KeyError, TypeError):
        lines, code = ["audit: not done, no package index can be reached"], 0
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main())
