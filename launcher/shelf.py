"""Puts the shipped workflows into the editor's list and leaves alone what a user has changed."""

import hashlib
import json
from pathlib import Path

from . import stamp


def place(shipped: Path, target: Path, record_file: Path) -> tuple[list[str], list[str]]:
    """Copy ``shipped/*.json`` to the folder ``target``; return (names written, names kept as the user edited them).

    ``record_file`` remembers the SHA-256 of every version written to each place. A file is replaced only if it still
    equals one of these, so an edited copy and a user's own file of the same name both stay.
    """
    record: dict[str, list[str]] = {}
    if record_file.is_file():
        record = json.loads(record_file.read_text(encoding="utf-8"))
    written, kept = [], []
    for source in sorted(shipped.glob("*.json")):
        content = source.read_bytes()
        fingerprint = hashlib.sha256(content).hexdigest()
        copy = target / source.name
        known = record.setdefault(str(copy), [])
        if copy.is_file():
            present = stamp.digest(copy)
            if present == fingerprint:
                known += [fingerprint] if fingerprint not in known else []
                continue
            if present not in known:
                kept.append(source.name)
                continue
        target.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(content)
        known += [fingerprint] if fingerprint not in known else []
        written.append(source.name)
    stamp.write(record_file, record)
    return written, kept
