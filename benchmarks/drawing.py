"""How well the demo draws through the pack's nodes: prompts in, judged pictures out.

Run: ZIMAGE_COMFYUI=<tree> python benchmarks/drawing.py [--count 500] [--out benchmarks/results/drawing.json]
"""

import argparse
import json
import sys
import types
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
package = types.ModuleType("zimage_turbo")
package.__path__ = [str(PACK)]
sys.modules["zimage_turbo"] = package

from zimage_turbo.benchmarks.conditions import conditions  # noqa: E402
from zimage_turbo.launcher.inside import host  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500, help="prompts of each set")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--processes", type=int, default=2, help="processes that judge")
    parser.add_argument("--out", type=Path, default=PACK / "benchmarks" / "results" / "drawing.json")
    arguments = parser.parse_args()
    host.enter(host.tree(), [])
    arguments.out.write_text(json.dumps(measure(arguments), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def measure(arguments: argparse.Namespace) -> dict:
    import torch

    from zimage_turbo.demo.evaluate import failures, score
    from zimage_turbo.demo.prompts import SETS
    from zimage_turbo.tests.drawing import node_draw

    report = {
        **conditions(),
        "precision": arguments.precision,
        "nfe": 8,
        "sets": {},
        "failures": {},
    }
    with torch.inference_mode():
        draw = node_draw(arguments.precision)
        for name, prompts_of in SETS.items():
            prompts = prompts_of(arguments.count)
            report["sets"][name], verdicts = score(draw, prompts, arguments.processes)
            report["failures"][name] = failures(prompts, verdicts)
            print(name, json.dumps(report["sets"][name]), flush=True)
    return report


if __name__ == "__main__":
    main()
