"""What Gluon makes of a kernel for an H100, on any machine.

In a process of its own: where tests run Triton in its interpreter, it compiles nothing.
"""

import json
import os
import subprocess
import sys

SCRIPT = """
import importlib, json, sys, types

package = types.ModuleType("zimage_turbo")
package.__path__ = [sys.argv[1]]
sys.modules["zimage_turbo"] = package
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

kernel = importlib.import_module(f"zimage_turbo.kernels.{sys.argv[2]}")._attention_kernel
types, constants = map(json.loads, sys.argv[3:])
signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
source = GluonASTSource(kernel, signature, constexprs=constants)
made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
print(json.dumps([made.asm["ptx"], made.metadata.shared]))
"""


def compiled(pack, module, types, constants) -> tuple[str, int]:
    """PTX of a module's _attention_kernel, and its bytes of shared memory; arguments without a type are int32."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT, str(pack), module, json.dumps(types), json.dumps(constants)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return tuple(json.loads(ran.stdout))


def described(dtype, rows, layout) -> str:
    """The type of a tensor that the copy engine reads in boxes of so many rows of 128."""
    return f"tensordesc<{dtype}[{rows}, 128], {layout!r}>"
