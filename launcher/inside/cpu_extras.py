"""Makes CUDA-linked torchvision and torchaudio wheels importable beside a CPU build of torch.

Run by the launcher with the Python of its own environment; running it again changes nothing. Prints what it did.

Without their shared objects torchaudio runs as plain Python, and torchvision needs no more than the schemas of two
operators that its module for fake tensors refers to. They get no kernel: calling ``nms`` raises, resizing works.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

MARKER = "# Added by z-image-turbo: schemas of the operators whose CUDA library was removed."
SCHEMAS = f"""
{MARKER}
if not _has_ops():
    _schemas = torch.library.Library("torchvision", "DEF")
    for _operator in ("nms", "qnms"):
        _schemas.define(f"{{_operator}}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def import_error():
    """Return the last line of the error that importing both packages gives, or None when it works."""
    code = "import torchvision, torchaudio"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return None if answer.returncode == 0 else answer.stderr.strip().splitlines()[-1]


def remove_libraries(packages):
    """Delete the shared objects of both packages below ``packages`` (site-packages); return how many."""
    libraries = [*(packages / "torchaudio" / "lib").glob("*.so"), *(packages / "torchvision").glob("*.so")]
    for library in libraries:
        library.unlink()
    return len(libraries)


def define_schemas(packages):
    """Append the schemas to torchvision's extension module unless they stand there already."""
    extension = packages / "torchvision" / "extension.py"
    text = extension.read_text(encoding="utf-8")
    if MARKER not in text:
        extension.write_text(text + SCHEMAS, encoding="utf-8")


def main():
    if import_error() is None:
        print("torchvision and torchaudio import as they are")
        return
    packages = Path(sysconfig.get_paths()["purelib"])
    removed = remove_libraries(packages)
    define_schemas(packages)
    left = import_error()
    if left is not None:
        sys.exit(f"torchvision or torchaudio still cannot be imported: {left}")
    print(f"removed {removed} CUDA libraries of torchvision and torchaudio: torch is a CPU build")


if __name__ == "__main__":
    main()
