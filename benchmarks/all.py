"""Every benchmark one after the other on one GPU, each a process of its own with its own time limit and result.

Run: ZIMAGE_COMFYUI=<tree> python benchmarks/all.py (--random-weights FOLDER | --models FOLDER | --demo) --out FOLDER
     [--only NAME …] [--quick]
--out gets one JSON a part, called by the part and the GPU (denoise_h100.json), and the plots of those that have some.
An older result of a part that runs is removed first. Weights are made once, where there are none. A part that fails
does not stop the others: the table at the end says what ran, how long and what failed, and so does the exit status.
On a machine with several GPUs the first is taken, or the one that CUDA_VISIBLE_DEVICES says.
first_run.py, drawing.py and int4_shapes.py are left out: they need no GPU and say nothing about one; so is
multi_gpu.py, which is of several.
"""

import argparse
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
package = types.ModuleType("zimage_turbo")
package.__path__ = [str(PACK)]
sys.modules["zimage_turbo"] = package

from zimage_turbo.benchmarks import parts, weight_files  # noqa: E402

# in a process of its own, so that no CUDA context stays behind
DEVICE = "import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else '')"
MAKING = 1800  # seconds for 20 GB of weights


def main() -> None:
    arguments, wanted = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception it ends the part on its way out
    environment = {"CUDA_VISIBLE_DEVICES": "0"} | os.environ
    device = subprocess.run([sys.executable, "-c", DEVICE], env=environment, check=True, capture_output=True, text=True)
    weights = weight_files.words(arguments) if any(part.needs_weights for part in wanted) else []
    under = parts.Conditions(arguments.out, device.stdout.strip(), weights, arguments.quick, environment)
    under.out.mkdir(parents=True, exist_ok=True)
    outcomes: list[parts.Outcome] = []
    try:
        if weights and arguments.random_weights:  # before the first part that would make them within its own limit
            maker = [sys.executable, str(weight_files.MAKER), str(arguments.random_weights)]
            outcomes.append(parts.run("weights", maker, MAKING, environment))
        for part in wanted:
            outcomes.append(parts.measure(part, under))
        outcomes.append(parts.draw(outcomes, environment))
    finally:
        print("\n".join(parts.table(outcomes)), flush=True)
    sys.exit(any(outcome.failed for outcome in outcomes))


def parse(words: list[str]) -> tuple[argparse.Namespace, list[parts.Part]]:
    """The arguments, and the parts that they ask for in the order of PARTS."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    weight_files.add_arguments(parser, required=False)
    names = [part.name for part in parts.PARTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="fewer sizes and counts: some 20 minutes on an H100")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    arguments = parser.parse_args(words)
    wanted = [part for part in parts.PARTS if part.name in arguments.only]
    given = arguments.models or arguments.random_weights or arguments.demo
    if wanting := [part.name for part in wanted if part.needs_weights and not given]:
        parser.error(f"{', '.join(wanting)}: needs weights. Add --random-weights FOLDER, --models FOLDER or --demo.")
    return arguments, wanted


if __name__ == "__main__":
    main()
