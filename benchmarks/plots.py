"""Pictures of what benchmarks/server.py measured: latency and throughput by contestant, memory over time.

Run: python benchmarks/plots.py RESULT.json … [--out FOLDER]. Needs matplotlib. Writes RESULT_latency.png,
RESULT_batch.png and RESULT_memory.png beside each result.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

WIDTH, HEIGHT, DPI = 9, 4.5, 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="files that server.py wrote with --out")
    parser.add_argument("--out", type=Path, help="folder for the pictures; by default that of each result")
    arguments = parser.parse_args()
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit("No plots: matplotlib is not installed. Install it with: python -m pip install matplotlib")
    for result in arguments.results:
        report = json.loads(result.read_text(encoding="utf-8"))
        folder = arguments.out or result.parent
        folder.mkdir(parents=True, exist_ok=True)
        for kind, draw in (("latency", latency), ("batch", batches), ("memory", memory)):
            path = folder / f"{result.stem}_{kind}.png"
            written = save(report, draw, path)
            print(f"wrote {path}" if written else f"no {kind} plot: {result.name} holds nothing for it")


def save(report: dict, draw, path: Path) -> bool:
    """Draw on one pair of axes and write a PNG; False when there is nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(report, axes)
    if not axes.has_data():
        return False
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    axes.set_title(f"{report['hardware']}\n{versions}, weights: {report['weights']}, {report['date']}", fontsize=7)
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


if __name__ == "__main__":
    main()
