"""A stamp is a small JSON file that says what a finished step was made from.

It is cleared before the step and written after it, so a step that was interrupted is repeated and a finished one with
the same record is skipped.
"""

import hashlib
import json
import os
from pathlib import Path


def is_current(path: Path, record: dict) -> bool:
    """Return whether ``path`` holds exactly ``record``. A missing or unreadable stamp means: do the step."""
    if not path.is_file():
        return False
    try:
        return json.loads(path.read_text(encoding="utf-8")) == record
    except ValueError:  # cut off by a crash of the machine
        return False


def write(path: Path, record: dict) -> None:
    """Write ``record`` so that a crash leaves the old stamp or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".new")
    draft.write_text(json.dumps(record, indent=1, sort_keys=True), encoding="utf-8")
    os.replace(draft, path)


def clear(path: Path) -> None:
    path.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
