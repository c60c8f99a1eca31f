"""A table of findings for the terminal: mark, subject, what was found, and a remedy below where one is needed."""

import dataclasses

OK, NOTE, PROBLEM = "ok", "note", "PROBLEM"


@dataclasses.dataclass(frozen=True)
class Row:
    """One finding. ``remedy`` says what to do; only a PROBLEM keeps the pack from working."""

    mark: str
    subject: str
    found: str
    remedy: str = ""


def render(rows: list[Row]) -> str:
    """Return the rows as aligned lines, each remedy on a line of its own below its row."""
    marks = max(len(row.mark) for row in rows)
    subjects = max(len(row.subject) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{row.mark:<{marks}}  {row.subject:<{subjects}}  {row.found}")
        if row.remedy:
            lines.append(f"{'':<{marks + subjects + 4}}-> {row.remedy}")
    return "\n".join(lines)
