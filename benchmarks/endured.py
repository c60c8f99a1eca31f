"""What a long run of benchmarks/group_endurance.py shows: whether the group held, and the figures behind that."""

from collections import Counter
from statistics import median

SETTLED = 0.2  # what is held after this share of the pictures is compared with the end
WINDOW = 0.1  # memory's median in so many before: what one request frees is given back to the system in a later one
ALLOWED = 0.02  # growth of memory since
RECOVERED = 60.0  # seconds from a fault, or a cancel, to the end of the request that it hit
MEMORY = ("kept_mib", "allocated_mib")  # what torch keeps beyond that on a GPU is the host's to give back


def verdict(report: dict) -> dict:
    """`summary`, `holds` by what was asked for, and whether all of it `held`; for a run that broke off only this."""
    rows, wanted = report["requests"], report["arguments"]["images"]
    shares = [row["images"] / wanted for row in rows]
    settled = [row for row, share in zip(rows, shares, strict=True) if share <= SETTLED]
    early = [row for row, share in zip(rows, shares, strict=True) if SETTLED - WINDOW < share <= SETTLED]
    late = [row for row, share in zip(rows, shares, strict=True) if share > 1 - WINDOW]
    if not early or rows[-1]["images"] < wanted:
        return {"held": False}
    grown = {
        name: growth([holders(row)[name] for row in early], [holders(row)[name] for row in late])
        for name in holders(rows[-1])
    }
    waits = sorted(row["until_done_s"] for row in rows if row["hit"])
    cancels = sorted(row["until_done_s"] for row in rows if row["cancelled"])
    holds = {
        "same pictures": all(row["same"] for row in rows),
        "memory": all(share is None or share <= ALLOWED for share in grown.values()),
        "files and threads": not more(settled, rows[-1]),
        "processes": all(row["processes"] == 1 + len(row["ranks"]) for row in rows) and not report["left"]["processes"],
        "shared memory": not report["left"]["shared memory"],
        "recovery": max(waits + cancels, default=0.0) <= RECOVERED,
    }
    summary = {
        "requests": len(rows),
        "pictures": rows[-1]["images"],
        "splits": Counter(row["split"] for row in rows),
        "hits": Counter(row["hit"] for row in rows if row["hit"]),
        "seconds after a hit, median and most": middle_and_most(waits),
        "cancelled": len(cancels),
        "seconds after a cancel, median and most": middle_and_most(cancels),
        "memory settled after": settled[-1]["images"],
        "memory grown since, by share": grown,
    }
    return {"summary": summary, "holds": holds, "held": all(holds.values())}


def holders(row: dict) -> dict[str, dict]:
    """What every process of a group holds, by its name."""
    return {"coordinator": row["coordinator"]} | {f"rank {number}": held for number, held in enumerate(row["ranks"])}


def growth(early: list[dict], late: list[dict]) -> float | None:
    """The share by which a process holds more memory; of GPU and main memory the larger. None of several processes."""
    if len({held["pid"] for held in early + late}) > 1:
        return None
    kinds = [kind for kind in MEMORY if kind in late[0]]
    shares = [median(held[kind] for held in late) / median(held[kind] for held in early) - 1 for kind in kinds]
    return round(max(shares), 5)


def more(settled: list[dict], last: dict) -> list[str]:
    """Processes that at the last have more files or threads than they ever had until they settled."""
    until = [holders(row) for row in settled]
    return [
        f"{kind} of {name}"
        for name, held in holders(last).items()
        for kind in ("files", "threads")
        if held[kind] > max(each[name][kind] for each in until)
    ]


def middle_and_most(seconds: list[float]) -> list[float] | None:
    return [seconds[len(seconds) // 2], seconds[-1]] if seconds else None
