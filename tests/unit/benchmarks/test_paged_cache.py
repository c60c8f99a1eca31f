"""The benchmark of the paged cache: what it is given shares what it says, and what it counts is right."""

import json

import pytest
import torch

from zimage_turbo.benchmarks import paged_cache
from zimage_turbo.engine import encoder


@pytest.fixture(scope="module")
def loaded():
    with torch.inference_mode():
        return paged_cache.demo()


def test_styles_are_shared_and_the_others_not():
    loads = paged_cache.workloads(60, 936)
    for name, shared in (("styles", True), ("unrelated", False)):
        prompts = loads[name]
        assert len(prompts) == 60 and {style for style, _ in prompts} == set(paged_cache.STYLES)
        beginnings = {tuple(ids[: paged_cache.HEAD + style]) for style, ids in prompts}
        assert len(beginnings) == (len(paged_cache.STYLES) * paged_cache.VARIANTS if shared else 60)
    lengths = ([len(ids) for _, ids in prompts] for prompts in loads.values())
    assert next(lengths) == next(lengths)


def test_a_small_run(loaded):
    report = paged_cache.measure(loaded[0], 24, 1)
    styles, unrelated = report["rows"]
    assert styles["gate"] and unrelated["gate"]
    assert styles["tokens_known"] > 0.3 and unrelated["tokens_known"] == 0
    page = 16 * 5 * 2**10  # the demo's: keys and values of 128 in four layers, and 256 states, all fp32
    lengths = [len(ids) // 16 for _, ids in paged_cache.workloads(24, 936)["unrelated"]]
    assert unrelated["pages_mib"] == unrelated["pages_unshared_mib"] == round(sum(lengths) * page / 2**20, 2)
    assert styles["pages_mib"] < styles["pages_unshared_mib"] < styles["reserved_mib"] == 24 * 512 * 5 / 2**10
    assert encoder.PAGED == ("cpu",)


def test_no_time_is_reported_where_results_differ(loaded, monkeypatch):
    monkeypatch.setattr(paged_cache, "compare", lambda *_: [1.0])
    rows = paged_cache.measure(loaded[0], 12, 1)["rows"]
    assert not any(row["gate"] or "pages" in row for row in rows)


def test_the_committed_results_held(pack):
    report = json.loads((pack / "benchmarks" / "results" / "paged_cache_cpu.json").read_text(encoding="utf-8"))
    assert report["encoder"] == "demo" and [row["what"] for row in report["rows"]] == ["styles", "unrelated"]
    assert all(row["gate"] and row["prompts"] >= 500 for row in report["rows"])
