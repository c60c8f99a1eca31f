"""What benchmarks/group_endurance.py makes of a run."""

import pytest

from zimage_turbo.benchmarks import endured

HELD = {"pid": 1, "kept_mib": 600.0, "files": 20, "threads": 9}


def report(requests=10):
    rows = [
        {
            "images": 10 * number, "pictures": 10, "split": "images", "hit": None, "cancelled": False, "same": True,
            "seconds": 1.0, "processes": 3, "shared memory": 0, "coordinator": dict(HELD),
            "ranks": [HELD | {"pid": 2}, HELD | {"pid": 3, "allocated_mib": 100.0}],
        }
        for number in range(1, requests + 1)
    ]  # fmt: skip
    return {"arguments": {"images": 100}, "requests": rows, "left": {"processes": 0, "shared memory": []}}


def failing(found):
    verdict = endured.verdict(found)
    names = [name for name, held in verdict["holds"].items() if not held]
    assert verdict["held"] == (not names)
    return names


def test_what_stays_as_it_was_held():
    found = report()
    found["requests"][0]["ranks"][0]["kept_mib"] = 300.0  # before it settles
    found["requests"][5]["ranks"][0] |= {"kept_mib": 900.0, "files": 30}  # what comes and goes again
    verdict = endured.verdict(found)
    assert verdict["held"] and verdict["summary"]["memory settled after"] == 20


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"same": False}, "same pictures"),
        ({"ranks": [HELD | {"pid": 2}, HELD | {"pid": 3, "allocated_mib": 103.0}]}, "memory"),
        ({"coordinator": HELD | {"kept_mib": 613.0}}, "memory"),
        ({"coordinator": HELD | {"threads": 10}}, "files and threads"),
        ({"processes": 4}, "processes"),
        ({"hit": "SIGSTOP of rank 0", "until_done_s": 61.0}, "recovery"),
    ],
)
def test_what_does_not_is_named(changes, expected):
    found = report()
    found["requests"][-1] |= changes
    assert failing(found) == [expected]


def test_what_is_left_at_the_end_is_named():
    found = report() | {"left": {"processes": 1, "shared memory": ["torch_1"]}}
    assert failing(found) == ["processes", "shared memory"]


def test_a_rank_that_was_started_anew_has_not_grown():
    found = report()
    found["requests"][-1]["ranks"][0] |= {"pid": 9, "kept_mib": 2000.0}
    grown = endured.verdict(found)["summary"]["memory grown since, by share"]
    assert grown == {"coordinator": 0.0, "rank 0": None, "rank 1": 0.0}


def test_a_run_that_broke_off_has_not_held():
    assert endured.verdict(report(requests=9)) == {"held": False}
