"""Version numbers and requirement lines, as far as this pack's own pins need them (pip does the real resolving)."""

import re
from importlib import metadata

_NUMBER = re.compile(r"\s*v?(\d+(?:\.\d+)*)(.*)")
_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[[^\]]*\])?\s*([^;#]*)(;[^#]*)?")
_CLAUSE = re.compile(r"\s*(>=|<=|==|!=|~=|>|<)\s*(\S+)\s*")


def parse_version(text: str) -> tuple[tuple[int, ...], bool]:
    """Return (release numbers without trailing zeros, is a final release). ``0.31.0rc1`` sorts before ``0.31.0``.

    A local part (``+cpu``) and a post-release are ignored. Raises ValueError for text without a number.
    """
    match = _NUMBER.match(text)
    if not match:
        raise ValueError(f"'{text}' is not a version number: expected something like 0.30.0")
    numbers = [int(part) for part in match[1].split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    is_final = re.match(r"[._-]?(a|b|c|rc|alpha|beta|pre|preview|dev)", match[2].lower()) is None
    return tuple(numbers), is_final


def satisfies(version: str, specifiers: str) -> bool:
    """Return whether ``version`` meets every clause of ``specifiers``, e.g. ``">=0.30.0,<0.40"``; empty text is met."""
    found = parse_version(version)
    for clause in filter(str.strip, specifiers.split(",")):
        match = _CLAUSE.fullmatch(clause)
        if not match:
            raise ValueError(f"'{clause}' is not a version condition: expected something like >=0.30.0")
        if not _meets(found, match[1], match[2]):
            return False
    return True


def _meets(found: tuple[tuple[int, ...], bool], operator: str, text: str) -> bool:
    if text.endswith(".*"):
        prefix = tuple(int(part) for part in text[:-2].split("."))
        padded = found[0] + (0,) * len(prefix)
        return (padded[: len(prefix)] == prefix) == (operator == "==")
    wanted = parse_version(text)
    if operator == "~=":
        prefix = tuple(int(part) for part in text.split(".")[:-1])
        padded = found[0] + (0,) * len(prefix)
        return found >= wanted and padded[: len(prefix)] == prefix
    return {
        ">=": found >= wanted,
        "<=": found <= wanted,
        "==": found == wanted,
        "!=": found != wanted,
        ">": found > wanted,
        "<": found < wanted,
    }[operator]


def parse_requirement(line: str) -> tuple[str, str] | None:
    """Return (name, specifiers) of a requirement line.

    None for an empty line, a comment, an option, or a line with an environment marker, which only pip can judge.
    """
    match = _REQUIREMENT.match(line)
    if not match or match[3]:
        return None
    return match[1], match[2].strip()


def installed_problem(requirement: str) -> str | None:
    """Say what is wrong with a requirement in the running Python, or None when it is met."""
    parsed = parse_requirement(requirement)
    if parsed is None:
        return None
    name, specifiers = parsed
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name} is not installed"
    return None if satisfies(version, specifiers) else f"{name} {version} is installed, {specifiers} is needed"
