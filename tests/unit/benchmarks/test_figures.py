"""The figures in the READMEs are those of benchmarks/results."""

import json
import re

import pytest

from zimage_turbo.benchmarks.gate import ONE_EVALUATION

LABELS = {
    "host bf16": "ComfyUI 0.30", "ours bf16": "`bf16`", "ours fp16": "`fp16`", "ours fp8": "`fp8`",
    "ours int4": "`int4`", "ours int4-fp8": "`int4-fp8`", "diffusers bf16": "diffusers 0.42",
    "diffusers bf16, torch.compile": "torch.compile",
}  # fmt: skip
CONTESTANTS = {
    "stock nodes": ("ComfyUI 0.30", "--gpu-only"), "stock nodes, --gpu-only": ("`--gpu-only`", ""),
    "our nodes, int4-fp8": ("`int4-fp8`", ""), "our nodes, fp8": ("`fp8`", ""),
}  # fmt: skip


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_speed_of_the_denoiser(pack, page):
    rows = json.loads((pack / "benchmarks" / "results" / "denoise_h100.json").read_text(encoding="utf-8"))["rows"]
    lines = [line for line in (pack / page).read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    shown = [row for row in rows if row.get("batch", 1) == 1 and row["what"] in LABELS]
    assert {row["what"] for row in shown} >= {"host bf16", "ours bf16", "ours fp8", "ours int4-fp8"}
    for row in shown:
        line = next(line for line in lines if LABELS[row["what"]] in line and " ms |" in line)
        assert row["gate"] and f"{row['denoise_ms']:,.0f} ms" in line
        if row["size"] == 1024:
            assert f"{100 * row['error']:.1f} %" in line


def test_quantised_denoisers_are_within_the_bounds_of_today(pack):
    """A bound that what was measured does not meet would keep the next run from timing anything."""
    rows = json.loads((pack / "benchmarks" / "results" / "denoise_h100.json").read_text(encoding="utf-8"))["rows"]
    found = [(row["what"].removeprefix("ours "), row["error"]) for row in rows]
    bounded = [(precision, error) for precision, error in found if precision in ONE_EVALUATION]
    assert {precision for precision, _ in bounded} >= {"fp8", "int4-fp8"}
    for precision, error in bounded:
        assert error <= ONE_EVALUATION[precision]


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_speed_of_the_server(pack, page):
    """A line holds a contestant's name, and not what tells another one from it."""
    report = json.loads((pack / "benchmarks" / "results" / "server_h100.json").read_text(encoding="utf-8"))
    text = (pack / page).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| ") and " s |" in line]
    named = {entry["name"] for entry in report["contestants"]}
    assert {"stock nodes", "stock nodes, --gpu-only", "our nodes, int4-fp8"} <= named <= set(CONTESTANTS)
    for entry in report["contestants"]:
        name, other = CONTESTANTS[entry["name"]]
        (line,) = (line for line in lines if name in line and not (other and other in line))
        for row in entry["rows"]:
            assert row["gate"] and f" {row['p50_s']:.2f} s" in line
        if "second_start" in entry:
            assert f"{entry['first_image_s']:.0f} s" in text
            assert f"{entry['second_start']['first_image_s']:.1f} s" in text
            assert entry["second_start"]["compiled"] == 0


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_memory(pack, page):
    results, text = pack / "benchmarks" / "results", (pack / page).read_text(encoding="utf-8")
    for cap in (8, 6):
        report = json.loads((results / f"memory_{cap}gib_h100.json").read_text(encoding="utf-8"))
        assert {run["precision"] for run in report["runs"]} == {"int4", "int4-fp8"}
        assert not any("failed" in run for run in report["runs"])
        assert cap == 6 or all(run["all_resident"] for run in report["runs"])
        assert f"{max(run['peak_allocated_gib'] for run in report['runs']):.1f} GiB" in text
    report = json.loads((results / "endurance_h100.json").read_text(encoding="utf-8"))
    assert report["held"] and f"{100 * report['growth']:.2f} %" in text


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_speed_of_the_text_encoder_and_the_vae(pack, page):
    results, text = pack / "benchmarks" / "results", (pack / page).read_text(encoding="utf-8")
    rows = json.loads((results / "text_encoder_h100.json").read_text(encoding="utf-8"))["rows"]
    shown = [(row, row["ms"]) for row in rows if row["tokens"] == 64 and row["what"] != "host in bf16"]
    rows = json.loads((results / "vae_h100.json").read_text(encoding="utf-8"))["rows"]
    shown += [(row, row["decode_ms"]) for row in rows if row["batch"] == 1]
    assert len(shown) == 7
    for row, milliseconds in shown:
        assert row["gate"] and f" {milliseconds:.1f} ms" in text


@pytest.mark.parametrize(
    ("page", "word"), [("README.md", "{:.1f} to {:.1f} times"), ("README.zh.md", "{:.1f} 到 {:.1f} 倍")]
)
def test_speed_of_int4_products(pack, page, word):
    results, text = pack / "benchmarks" / "results", " ".join((pack / page).read_text(encoding="utf-8").split())
    ratios = {1: [], 16: [], 64: []}
    for block in (results / "int4_few_rows_h100.txt").read_text(encoding="utf-8").split("\nN=")[1:]:
        rows, bf16, ours = re.search(r" M=(\d+) bf16 ([\d.]+) chosen ([\d.]+)", block).groups()
        if int(rows) in ratios:
            ratios[int(rows)].append(float(bf16) / float(ours))
    assert [len(found) for found in ratios.values()] == [8, 8, 8]
    lines = (results / "int4_many_rows_h100.txt").read_text(encoding="utf-8").splitlines()
    many = [float(line.split()[4]) for line in lines if re.match(r" *\d+ +\d+ ", line)]
    assert len(many) == 4
    for found in (*ratios.values(), many):
        assert word.format(min(found), max(found)) in text


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_time_of_prompts_in_pages(pack, page):
    report = json.loads((pack / "benchmarks" / "results" / "paged_cache_cpu.json").read_text(encoding="utf-8"))
    saved = {row["what"]: row["time_saved"] for row in report["rows"] if row["gate"]}
    (line,) = (text for text in (pack / page).read_text(encoding="utf-8").split("\n- ") if "paged_cache_cpu" in text)
    assert f"{100 * saved['styles']:.0f} %" in line and f"{-100 * saved['unrelated']:.0f} %" in line


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_quality_of_the_demo(pack, page):
    sets = json.loads((pack / "benchmarks" / "results" / "drawing.json").read_text(encoding="utf-8"))["sets"]
    text = (pack / page).read_text(encoding="utf-8")
    for name in sets:
        assert f"{100 * sets[name]['items']['rate']:.1f} %" in text
