"""Pictures of what was measured: latency and throughput by contestant, memory over time.

Run: python benchmarks/plots.py RESULT.json … [--out FOLDER]. Needs matplotlib. Beside each result it writes, of
server.py, RESULT_latency.png, RESULT_batch.png and RESULT_memory.png, of denoise.py RESULT_batch.png, of memory.py,
endurance.py and group_endurance.py RESULT_memory.png, of multi_gpu.py RESULT_rate.png and RESULT_latency.png.
"""

import argparse
import functools
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

WIDTH, HEIGHT, DPI = 9, 4.5, 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="files that a benchmark wrote with --out")
    parser.add_argument("--out", type=Path, help="folder for the pictures; by default that of each result")
    arguments = parser.parse_args()
    if not available():
        sys.exit("No plots: matplotlib is not installed. Install it with: python -m pip install matplotlib")
    for result in arguments.results:
        folder = arguments.out or result.parent
        folder.mkdir(parents=True, exist_ok=True)
        write(json.loads(result.read_text(encoding="utf-8")), folder / result.name)


def available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def write(report: dict, result: Path) -> None:
    """All plots of a report, beside the file that it is or will be in."""
    for kind, draw in kinds(report).items():
        path = result.with_name(f"{result.stem}_{kind}.png")
        written = save(title(report), functools.partial(draw, report), path)
        print(f"wrote {path}" if written else f"no {kind} plot: {result.name} holds nothing for it")


def kinds(report: dict) -> dict[str, Callable]:
    """What can be drawn of a report, by the benchmark that made it."""
    if "contestants" in report:
        return {"latency": latency, "batch": batches, "memory": memory}
    if "pictures" in report:
        return {"memory": endurance}
    if "ranks" in report:
        return {"rate": rate_by_gpus, "latency": latency_by_size}
    if "requests" in report:
        return {"memory": group_endurance}
    if "cap_gib" in report:
        return {"memory": phases}
    return {"batch": denoise_batches}


def title(report: dict) -> str:
    """Under what it was measured."""
    driver = f", driver {report['driver']}" if report.get("driver") else ""
    device = report.get("hardware") or report["device"] + driver
    versions = report.get("versions") or {name: report[name] for name in ("torch", "triton", "comfyui")}
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{device}\n{named}, weights: {report.get('weights', 'random, full size')}, {report['date']}"


def save(heading: str, draw: Callable, path: Path) -> bool:
    """Draw on one pair of axes and write a PNG; False when there is nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(axes)
    if not axes.has_data():
        return False
    axes.set_title(heading, fontsize=7)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=DPI)
    return True


def timed_rows(contestant: dict) -> list[dict]:
    """The rows that hold times: those whose picture was right."""
    return [row for row in contestant.get("rows", []) if "p50_s" in row]


def latency(report: dict, axes) -> None:
    """Bars of the median of single pictures, from p20 to p80, grouped by size."""
    single = [(entry["name"], {row["size"]: row for row in timed_rows(entry) if row["batch"] == 1})
              for entry in report["contestants"]]  # fmt: skip
    single = [(name, rows) for name, rows in single if rows]
    sizes = sorted({size for _, rows in single for size in rows})
    width = 0.8 / max(len(single), 1)
    for index, (name, rows) in enumerate(single):
        places = [sizes.index(size) + (index - (len(single) - 1) / 2) * width for size in rows]
        medians = [row["p50_s"] for row in rows.values()]
        below = [row["p50_s"] - row["p20_s"] for row in rows.values()]
        above = [row["p80_s"] - row["p50_s"] for row in rows.values()]
        bars = axes.bar(places, medians, width, yerr=(below, above), capsize=2, label=name)
        axes.bar_label(bars, [f"{median:.2f}" for median in medians], fontsize=6, padding=2)
    axes.set_xticks(range(len(sizes)), [f"{size} × {size}" for size in sizes])
    axes.set_ylabel("posted to picture in history, s (p50, p20 to p80)")


def batches(report: dict, axes) -> None:
    """Seconds a picture by batch, a line for every contestant and size with more than one batch."""
    for entry in report["contestants"]:
        rows = timed_rows(entry)
        for size in sorted({row["size"] for row in rows}):
            points = sorted((row["batch"], row["p50_s"] / row["batch"]) for row in rows if row["size"] == size)
            if len(points) > 1:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"{entry['name']}, {size}")
    axes.set_xticks(sorted({row["batch"] for entry in report["contestants"] for row in timed_rows(entry)}))
    axes.set_xlabel("pictures drawn at once")
    axes.set_ylabel("s a picture (p50)")
    axes.set_ylim(bottom=0)


def memory(report: dict, axes) -> None:
    """Memory from the start of the server to its last timed prompt of the first row: the GPU's, or RAM without one."""
    on_gpu = any(entry.get("gpu_memory_by") for entry in report["contestants"])
    for entry in report["contestants"]:
        samples = entry.get("memory", [])
        if timed_rows(entry) and samples:
            seconds, ram, gpu = zip(*samples, strict=True)
            axes.plot(seconds, [value / 1024 for value in (gpu if on_gpu else ram)], linewidth=1, label=entry["name"])
    axes.set_xlabel("seconds since the server was started")
    axes.set_ylabel("GPU memory of the server, GiB" if on_gpu else "RAM of the server, GiB")


def denoise_batches(report: dict, axes) -> None:
    """Milliseconds a picture of eight evaluations by batch, a line for every row name and size."""
    rows = [row for row in report["rows"] if "denoise_ms" in row]
    for name, size in dict.fromkeys((row["what"], row["size"]) for row in rows):
        line = [row for row in rows if (row["what"], row["size"]) == (name, size)]
        points = sorted((row["batch"], row["denoise_ms"] / row["batch"]) for row in line)
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"{name}, {size}")
    axes.set_xticks(sorted({row["batch"] for row in rows}))
    axes.set_xlabel("pictures computed at once")
    axes.set_ylabel("ms a picture, eight evaluations (p50)")
    axes.set_ylim(bottom=0)


def phases(report: dict, axes) -> None:
    """What the allocator held from loading to the last picture, by precision, below the cap."""
    axes.axhline(report["cap_gib"], color="black", linestyle="--", linewidth=1, label="cap")
    for index, run in enumerate(report["runs"]):
        seconds, allocated, reserved = zip(*run["series"], strict=True)
        colour = f"C{index}"
        axes.plot(seconds, [value / 1024 for value in allocated], color=colour, linewidth=1,
                  label=f"{run['precision']}, allocated")  # fmt: skip
        axes.plot(seconds, [value / 1024 for value in reserved], color=colour, linewidth=1, linestyle=":",
                  label=f"{run['precision']}, reserved")  # fmt: skip
        for row in run["phases"]:
            if row["phase"].startswith("encode"):  # where a picture begins
                axes.axvline(row["begin_s"], color=colour, linewidth=0.5, alpha=0.5)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds since loading began; thin lines: a picture begins")
    axes.set_ylabel("GPU memory of torch's allocator, GiB")


def endurance(report: dict, axes) -> None:
    """Memory after every picture of a long row."""
    numbers = [row["number"] for row in report["pictures"]]
    for key, label in (("allocated_mib", "allocated"), ("reserved_mib", "reserved")):
        axes.plot(numbers, [row[key] / 1024 for row in report["pictures"]], linewidth=1, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"pictures of random sizes and prompts drawn, {report['precision']}")
    axes.set_ylabel("GPU memory of torch's allocator, GiB")


def rate_by_gpus(report: dict, axes) -> None:
    """Pictures a second by the number of GPUs, a line for every precision and number of pictures a card, each with as
    many times the rate of one GPU."""
    rows = [row for row in report["rows"] if row["what"] == "images"]
    for index, key in enumerate(dict.fromkeys((row["precision"], row["a_card"]) for row in rows)):
        points = sorted((row["gpus"], row["images_per_s"]) for row in rows if (row["precision"], row["a_card"]) == key)
        gpus, rates = zip(*points, strict=True)
        axes.plot(gpus, rates, f"C{index}", marker="o", markersize=3, label=f"{key[0]}, {key[1]} a card")
        ideal, label = [rates[0] * count / gpus[0] for count in gpus], None if index else "so many times one GPU"
        axes.plot(gpus, ideal, f"C{index}", linestyle=":", linewidth=1, label=label)
    axes.set_xticks(sorted({row["gpus"] for row in rows}))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("pictures a second, denoised and decoded (p50)")


def latency_by_size(report: dict, axes) -> None:
    """Seconds of one denoised picture by its side, a line for every precision and number of GPUs that draw it."""
    rows = [row for row in report["rows"] if row["what"] == "latency"]
    for precision, gpus in dict.fromkeys((row["precision"], row["gpus"]) for row in rows):
        line = [row for row in rows if (row["precision"], row["gpus"]) == (precision, gpus)]
        points = sorted((row["size"], row["denoise_p50_s"]) for row in line)
        by = "1 GPU" if gpus == 1 else f"{gpus} GPUs together"
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"{precision}, {by}")
    axes.set_xticks(sorted({row["size"] for row in rows}))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("side of the picture, pixels")
    axes.set_ylabel("s of denoising one picture, eight evaluations (p50)")


def group_endurance(report: dict, axes) -> None:
    """Memory of every process of a group after every request of a long row; a rank that is started anew begins anew."""
    rows = report["requests"]
    images = [row["images"] for row in rows]
    for number in range(len(rows[0]["ranks"]) if rows else 0):
        for key, label in (("kept_mib", "main memory"), ("allocated_mib", "GPU"), ("reserved_mib", "GPU, reserved")):
            if key in rows[0]["ranks"][number]:
                held = [row["ranks"][number][key] / 1024 for row in rows]
                axes.plot(images, held, linewidth=1, label=f"rank {number}, {label}")
    coordinator = [row["coordinator"]["kept_mib"] / 1024 for row in rows]
    axes.plot(images, coordinator, linewidth=1, color="black", label="coordinator, main memory")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("pictures of random sizes, prompts and splits drawn")
    axes.set_ylabel("memory held, GiB")


if __name__ == "__main__":
    main()
