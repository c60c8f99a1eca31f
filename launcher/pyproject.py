"""Reads the few values the launcher needs from pyproject.toml.

``tomllib`` arrives with Python 3.11 and we support 3.10, so this reads the part of TOML our own file uses: tables,
basic strings and arrays of them. The tests compare it with ``tomllib`` where that exists.
"""

import ast
import re
from pathlib import Path

_TABLE = re.compile(r"^\[([^\[\]]+)\]\s*$")
_VALUE = re.compile(r"^([A-Za-z0-9_-]+)\s*=\s*(.*)$")


def read(path: Path, table: str, key: str) -> str | list[str]:
    """Return the string or list of strings at ``[table] key``.

    Raises KeyError when it is absent and ValueError when it is neither.
    """
    current = None
    lines = iter(path.read_text(encoding="utf-8").splitlines())
    for line in lines:
        header = _TABLE.match(line)
        if header:
            current = header[1].strip()
            continue
        pair = _VALUE.match(line)
        if current != table or not pair or pair[1] != key:
            continue
        text = pair[2]
        while text.startswith("[") and not text.rstrip().endswith("]"):
            text += "\n" + next(lines)
        value = ast.literal_eval(text)
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            return value
        raise ValueError(f"{path}: [{table}] {key} is neither a string nor a list of strings")
    raise KeyError(f"{path} has no [{table}] {key}")
