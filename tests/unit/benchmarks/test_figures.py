"""The figures in the READMEs are those of benchmarks/results."""

import itertools
import json
import re

import pytest

from zimage_turbo.benchmarks.gate import ONE_EVALUATION
from zimage_turbo.engine import ode, prompts

LABELS = {
    "host bf16": "ComfyUI 0.30", "ours bf16": "`bf16`", "ours fp16": "`fp16`", "ours fp8": "`fp8`",
    "ours int4": "`int4`", "ours int4-fp8": "`int4-fp8`", "diffusers bf16": "diffusers 0.42",
    "diffusers bf16, torch.compile": "torch.compile",
}  # fmt: skip
CONTESTANTS = {
    "stock nodes": ("ComfyUI 0.30", "--gpu-only"), "stock nodes, --gpu-only": ("`--gpu-only`", ""),
    "our nodes, int4-fp8": ("`int4-fp8`", ""), "our nodes, fp8": ("`fp8`", ""),
}  # fmt: skip
# Of tables, counted from the bar that they begin with: 1024, then 512.
DENOISER = {"h100": 2, "h200": 4}
SERVERS = {"h100": 2, "h100_slow_host": 4, "h200": 6}


def cell(line: str, column: int, size: int) -> str:
    return line.split("|")[column + {1024: 0, 512: 1}[size]].strip()


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
@pytest.mark.parametrize("gpu", DENOISER)
def test_speed_of_the_denoiser(pack, page, gpu):
    rows = json.loads((pack / "benchmarks" / "results" / f"denoise_{gpu}.json").read_text(encoding="utf-8"))["rows"]
    lines = [line for line in (pack / page).read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    shown = [row for row in rows if row.get("batch", 1) == 1 and row["what"] in LABELS]
    assert {row["what"] for row in shown} >= {"host bf16", "ours bf16", "ours fp8", "ours int4-fp8"}
    for row in shown:
        line = next(line for line in lines if LABELS[row["what"]] in line and " ms |" in line)
        assert row["gate"] and cell(line, DENOISER[gpu], row["size"]) == f"{row['denoise_ms']:,.0f} ms"
        if row["size"] == 1024:
            assert f"{100 * row['error']:.1f} %" in line


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_speed_of_batches(pack, page):
    report = json.loads((pack / "benchmarks" / "results" / "denoise_batches_h100.json").read_text(encoding="utf-8"))
    _, _, after = (pack / page).read_text(encoding="utf-8").partition("denoise_batches_h100.json")
    _, _, *table = after.partition("\n\n")[2].partition("\n\n")[0].splitlines()
    rows = report["rows"]
    assert len(rows) == 12 and len(table) == 4 and all(row["gate"] and row["size"] == 1024 for row in rows)
    for row in rows:
        (line,) = (line for line in table if LABELS[row["what"]] in line)
        place = 2 + (2, 4, 8).index(row["batch"])
        assert line.split("|")[place].strip() == f"{row['denoise_ms'] / row['batch']:.0f} ms"


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_speed_of_a_large_picture(pack, page):
    """What was not within its bound has an error there, and no time."""
    report = json.loads((pack / "benchmarks" / "results" / "denoise_2048_h100.json").read_text(encoding="utf-8"))
    (line,) = (line for line in paragraphs(pack / page) if "denoise_2048_h100.json" in line)
    assert {row["what"] for row in report["rows"]} == {"host bf16", "ours bf16", "ours fp8", "ours int4-fp8"}
    for row in report["rows"]:
        figures = [f"{row['denoise_ms'] / 1000:.2f} s"] if row["gate"] else []
        figures = figures or [f"{100 * row[name]:.1f} %" for name in ("error", "bound")]
        assert row["size"] == 2048 and all(figure in line for figure in figures)


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_speed_of_a_feed_forwards_gate(pack, page):
    report = json.loads((pack / "benchmarks" / "results" / "swiglu_linear_h100.json").read_text(encoding="utf-8"))
    (line,) = (line for line in paragraphs(pack / page) if "swiglu_linear_h100.json" in line)
    speeds = [row["speed-up"] for row in report["rows"]]
    assert len(speeds) == 6 and all(f" {speed:.2f} " in line for speed in (min(speeds), max(speeds)))


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_two_ranks_on_one_gpu(pack, page):
    report = json.loads((pack / "benchmarks" / "results" / "multi_gpu_shared_h100.json").read_text(encoding="utf-8"))
    start, images, sequence = report["rows"]
    assert len(set(report["ranks"])) == 1 and images["gate"] and sequence["gate"]
    (line,) = (line for line in paragraphs(pack / page) if "multi_gpu_shared_h100.json" in line)
    errors = [f"{100 * sequence[name]:.2f} %" for name in ("error", "own_error")]
    for figure in (f"{start['ready_s']:.1f} s", f"{start['load_s']:.1f} s", *errors):
        assert figure in line
    assert images["said"].startswith("4 of 4")


def paragraphs(page) -> list[str]:
    return [" ".join(each.splitlines()) for each in page.read_text(encoding="utf-8").split("\n\n")]


def test_quantised_denoisers_are_within_the_bounds_of_today(pack):
    """A bound that what was measured does not meet would keep the next run from timing anything."""
    rows = json.loads((pack / "benchmarks" / "results" / "denoise_h100.json").read_text(encoding="utf-8"))["rows"]
    found = [(row["what"].removeprefix("ours "), row["error"]) for row in rows]
    bounded = [(precision, error) for precision, error in found if precision in ONE_EVALUATION]
    assert {precision for precision, _ in bounded} >= {"fp8", "int4-fp8"}
    for precision, error in bounded:
        assert error <= ONE_EVALUATION[precision]


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
@pytest.mark.parametrize("machine", SERVERS)
def test_speed_of_the_server(pack, page, machine):
    """A line holds a contestant's name, and not what tells another one from it."""
    report = json.loads((pack / "benchmarks" / "results" / f"server_{machine}.json").read_text(encoding="utf-8"))
    lines = (pack / page).read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line.startswith("| ") and " s |" in line]
    assert {entry["name"] for entry in report["contestants"]} == set(CONTESTANTS)
    for entry in report["contestants"]:
        name, other = CONTESTANTS[entry["name"]]
        (line,) = (line for line in lines if name in line and not (other and other in line))
        for row in entry["rows"]:
            assert row["gate"] and cell(line, SERVERS[machine], row["size"]) == f"{row['p50_s']:.2f} s"


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_formats_of_the_host(pack, page):
    lines = (pack / "benchmarks" / "results" / "server_formats_h100.txt").read_text(encoding="utf-8").splitlines()
    rows = [re.split(r" {2,}", line) for line in lines if " nodes" in line and not line.startswith("#")]
    (said,) = (line for line in paragraphs(pack / page) if "server_formats_h100.txt" in line)
    assert len(rows) == 5
    for row in rows:
        seconds, mib, error, bound = row[4], row[7], float(row[9]), float(row[10])
        assert error <= bound and f"{float(seconds):.2f} s" in said and f"{int(mib) / 1024:.1f} GiB" in said


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_first_start_and_the_second(pack, page):
    results = pack / "benchmarks" / "results"
    (line,) = (line for line in paragraphs(pack / page) if "server_first_start_h100.json" in line)
    (entry,) = json.loads((results / "server_first_start_h100.json").read_text(encoding="utf-8"))["contestants"]
    slow = json.loads((results / "server_h100_slow_host.json").read_text(encoding="utf-8"))["contestants"]
    starts = [(entry, entry["second_start"]), *((each["first_start"], each) for each in slow if "first_start" in each)]
    assert len(starts) == 3
    for first, second in starts:
        assert first["rows"][0]["gate"] and first["compiled"] and f" {first['first_image_s']:.0f} s" in line
        assert second["compiled"] == 0 and f" {second['first_image_s']:.1f} s" in line


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_memory(pack, page):
    results, text = pack / "benchmarks" / "results", (pack / page).read_text(encoding="utf-8")
    for cap, gpu in itertools.product((8, 6), ("h100", "h200")):
        report = json.loads((results / f"memory_{cap}gib_{gpu}.json").read_text(encoding="utf-8"))
        assert {run["precision"] for run in report["runs"]} == {"int4", "int4-fp8"}
        assert not any("failed" in run for run in report["runs"])
        assert cap == 6 or all(run["all_resident"] for run in report["runs"])
        assert f"{max(run['peak_allocated_gib'] for run in report['runs']):.1f} GiB" in text
    report = json.loads((results / "endurance_h100.json").read_text(encoding="utf-8"))
    assert report["held"] and f"{100 * report['growth']:.2f} %" in text


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
@pytest.mark.parametrize("run", ["endurance", "faults"])
def test_endurance_of_a_group(pack, page, run):
    report = json.loads((pack / f"benchmarks/results/group_{run}_cpu.json").read_text(encoding="utf-8"))
    text, found = " ".join((pack / page).read_text(encoding="utf-8").split()), report["summary"]
    shown = [found["requests"], found["pictures"], found["cancelled"]]
    if run == "endurance":
        shown += [found["memory settled after"], f"{100 * max(found['memory grown since, by share'].values()):.1f} %"]
    else:
        shown += [
            sum(found["hits"].values()),
            *(f"{seconds:.0f} s" for seconds in found["seconds after a hit, median and most"]),
        ]
    assert report["held"] and all(re.search(rf" {each}(?![.\d])", text) for each in shown)


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_speed_of_the_text_encoder_and_the_vae(pack, page):
    results, text = pack / "benchmarks" / "results", (pack / page).read_text(encoding="utf-8")
    rows = json.loads((results / "text_encoder_h100.json").read_text(encoding="utf-8"))["rows"]
    shown = [(row, row["ms"]) for row in rows if row["tokens"] == 64 and row["what"] != "host in bf16"]
    for row, _ in shown[1:]:
        assert f" {row['model_gib']:.1f} GiB" in text  # which ranks that encode take too
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


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_quality_of_the_precisions(pack, page):
    """Of each: a line with the PSNR by attention, and the lowest and highest rate of items that were right."""
    rows = json.loads((pack / "benchmarks" / "results" / "precision_h100.json").read_text(encoding="utf-8"))["rows"]
    lines = (pack / page).read_text(encoding="utf-8").splitlines()
    drawn = [row for row in rows if "scores" in row]
    assert {row["precision"] for row in drawn} == {"fp32", "bf16", "fp16", "fp8", "int4", "int4-fp8"}
    for precision in {row["precision"] for row in drawn}:
        (line,) = (line for line in lines if line.startswith(f"| `{precision}` |"))
        rates = sorted(row["scores"]["items"]["rate"] for row in drawn if row["precision"] == precision)
        assert f"{100 * rates[-1]:.1f} %" in line and f" {100 * rates[0]:.1f}" in line
        for row in drawn:
            if row["precision"] == precision and row["psnr_db"] is not None:
                assert f" {row['psnr_db']:.1f} dB |" in line
    exact = next(row["scores"]["items"]["rate"] for row in drawn if row["precision"] == "fp32")
    lost = [exact - row["scores"]["items"]["rate"] for row in drawn if row["precision"].startswith("int4")]
    assert max(lost) <= 0.02


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_quality_of_the_solvers(pack, page):
    report = json.loads((pack / "benchmarks" / "results" / "quality_solvers_h200.json").read_text(encoding="utf-8"))
    text = (pack / page).read_text(encoding="utf-8")
    rows = {row["name"]: row for row in report["solvers"] if row["budget"] == 8}
    for name in set(rows) - {"host euler", "ours adaptive 0.1"}:  # euler is official, as the line of that says
        error, low, high = (100 * each for each in (rows[name]["error"]["mean"], *rows[name]["error"]["interval"]))
        said = f"| {error:.2f} [{low:.2f}, {high:.2f}] | {rows[name]['psnr_db']['mean']:.1f} |"
        assert said in text, name
    assert rows["host euler"]["error"] == rows["ours official"]["error"]
    assert report["prompts"] >= 500
    for budget in (6, 8, 12, 20):
        beside = [row for row in report["solvers"] if row["budget"] == budget]
        (ours,) = (row["error"]["mean"] for row in beside if row["name"] == "ours implicit")
        assert ours < min(row["error"]["mean"] for row in beside if row["by"] == "host")
    fewer = {row["name"]: f"{100 * row['error']['mean']:.1f} %" for row in report["solvers"] if row["budget"] == 4}
    assert all(fewer[name] in text for name in ("ours implicit", "host uni_pc as in KSampler", "host res_multistep"))
    adaptive = rows["ours adaptive 0.05"]
    assert f"{adaptive['evaluations']:.2f}" in text and f"{100 * adaptive['against_official']['lower']:.0f} %" in text
    times = report["ms_an_evaluation"].values()
    assert f"{min(times):.1f} " in text and f"{max(times):.1f} ms" in text


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_quality_of_tags(pack, page):
    report = json.loads((pack / "benchmarks" / "results" / "quality_tags_h200.json").read_text(encoding="utf-8"))
    text = (pack / page).read_text(encoding="utf-8")
    assert report["scenes"] >= 500
    cells = {cell["name"]: cell["scores"] for cell in report["cells"]}
    pairs = [(name, f"{name}, [zh], one context") for name in cells if f"{name}, [zh], one context" in cells]
    assert len(pairs) == 11
    for plain, tagged in pairs:
        both = [[100 * cells[name][score]["rate"] for score in ("items", "characters", "pictures")]
                for name in (plain, tagged)]  # fmt: skip
        if plain in ("Chinese", "English, Chinese sign"):
            assert all(f"| {items:.1f} % | {characters:.1f} % | {pictures:.1f} % [" in text
                       for items, characters, pictures in both)  # fmt: skip
        elif plain != "title marks, half-width commas, radicals":  # a sum of three that have lines of their own
            said = " | ".join(f"{before:.1f} → {after:.1f} %" for before, after in zip(*both, strict=True))
            assert f"| {said} |" in text


@pytest.mark.parametrize("page", ["ZImageTurboSampler.md", "ZImageTurboSampler/zh.md"])
def test_solvers_in_the_help_pages(pack, page):
    report = json.loads((pack / "benchmarks" / "results" / "quality_solvers_h200.json").read_text(encoding="utf-8"))
    text = (pack / "web" / "docs" / page).read_text(encoding="utf-8")
    eight, four = ({row["name"]: row for row in report["solvers"] if row["budget"] == budget} for budget in (8, 4))
    best = min((row for row in eight.values() if row["by"] == "host"), key=lambda row: row["error"]["mean"])
    shown = [best, *(eight[f"ours {solver}"] for solver in ("official", "implicit", "adaptive 0.05"))]
    shown += [four[name] for name in ("host uni_pc as in KSampler", "ours implicit")]
    assert all(f"{100 * row['error']['mean']:.1f} %" in text for row in shown)
    assert f"{eight['ours adaptive 0.05']['evaluations']:.2f}" in text and ode.TOLERANCE == 0.05
    assert min(four.values(), key=lambda row: row["error"]["mean"])["name"] == "host uni_pc as in KSampler"


@pytest.mark.parametrize("page", ["ZImageTurboTextEncode.md", "ZImageTurboTextEncode/zh.md"])
def test_segments_in_the_help_pages(pack, page):
    report = json.loads((pack / "benchmarks" / "results" / "quality_tags_h200.json").read_text(encoding="utf-8"))
    text = (pack / "web" / "docs" / page).read_text(encoding="utf-8")
    cells = {cell["name"]: cell["scores"] for cell in report["cells"]}
    both = [cells[f"English, Chinese sign, [zh], {spans}"] for spans in prompts.SPANS]
    for score in ("pictures", "characters"):
        assert all(f"{100 * scores[score]['rate']:.1f} %" in text for scores in both)
        one, own = (scores[score]["interval"] for scores in both)
        assert one[0] < own[1] and own[0] < one[1]  # intervals that overlap: no difference beyond chance was found
