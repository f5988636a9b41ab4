"""Files that appear whole: a reader sees the earlier one or the new one, never half of one."""

import os
import tempfile
from pathlib import Path


def write(path: Path, text: str) -> Path:
    """Write a text to a temporary name, to the disk itself, and rename it into place.

    Raises:
        OSError: naming the file, where it cannot be written; an earlier one is left as it was.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would shut out other users
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)  # there only where writing failed
    return path
