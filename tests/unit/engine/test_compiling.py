"""What is said while kernels are compiled and models are read: in the log, and on the node in the editor."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from comfy_execution.utils import CurrentNodeContext

import server
from zimage_turbo.engine import catalogue, compiling, loading, model, progress, quantiser
from zimage_turbo.engine.checkpoint import Checkpoint
from zimage_turbo.kernels import norm
from zimage_turbo.tests.weights import small_transformer

CUDA = torch.device("cuda:0")
OURS = SimpleNamespace(fn=SimpleNamespace(__module__=norm.__name__))
# Twice the same kernel for an sm_80, which needs no GPU: compiled, then found on disk.
SCRIPT = """
import json, logging, sys, types

package = types.ModuleType("zimage_turbo")
package.__path__ = [sys.argv[1]]
sys.modules["zimage_turbo"] = package
from pathlib import Path
from zimage_turbo.launcher.inside import host

host.enter(Path(sys.argv[2]), [])
logging.basicConfig(level="INFO")
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from zimage_turbo.engine import compiling
from zimage_turbo.kernels import int4_slices_triton

hits = []
knobs.compilation.listener = lambda *, cache_hit, **rest: hits.append(cache_hit)
compiling.announce(torch.device("cuda:0"))
kernel = int4_slices_triton._sum_slices_kernel
types = dict(zip(kernel.arg_names, ["*fp32", "*fp32", "*bf16", "*bf16", "i32", "i32", "i32"]))
constants = {"BIAS": True, "SLICES": 4, "BLOCK": 256, "EARLY": False}
signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
counts = []
for _ in range(2):
    triton.compile(ASTSource(kernel, signature, constexprs=constants), target=GPUTarget("cuda", 80, 32))
    counts.append(knobs.compilation.listener.count)
print(json.dumps([hits, counts]))
"""


@pytest.fixture
def shown(monkeypatch):
    """The (node, text, client) that the server was asked to send, in the host's own wire format."""
    sent = []

    class Server:
        client_id = "browser"
        send_progress_text = server.PromptServer.send_progress_text

        def send_sync(self, event, message, client):
            length = int.from_bytes(message[:4], "big")
            sent.append((message[4 : 4 + length].decode(), message[4 + length :].decode(), client))

    monkeypatch.setattr(server.PromptServer, "instance", Server(), raising=False)
    return sent


@pytest.fixture
def listener():
    return compiling.Listener()


def compiled(listener, src=OURS, cache_hit=False):
    listener(src=src, metadata={}, metadata_group={}, times=None, cache_hit=cache_hit)


def test_counts_on_the_node_and_logs_once_a_run(listener, shown, caplog):
    caplog.set_level("INFO")
    for prompt, node in (("a", "4"), ("a", "7"), ("b", "4")):
        with CurrentNodeContext(prompt, node):
            compiled(listener)
    assert [(node, text.partition(" (")[0], client) for node, text, client in shown] == [
        ("4", "GPU kernels compiled: 1", "browser"),
        ("7", "GPU kernels compiled: 2", "browser"),
        ("4", "GPU kernels compiled: 1", "browser"),
    ]
    assert caplog.text.count("compiling GPU kernels") == 2


@pytest.mark.parametrize(
    ("src", "cache_hit"),
    [
        (OURS, True),
        (SimpleNamespace(fn=SimpleNamespace(__module__="another_pack.kernels")), False),
        (SimpleNamespace(path="kernel.ttgir"), False),
    ],
    ids=["found on disk", "of another pack", "from a file"],
)
def test_does_not_count(listener, shown, caplog, src, cache_hit):
    caplog.set_level("INFO")
    with CurrentNodeContext("a", "4"):
        compiled(listener, src, cache_hit)
    assert listener.count == 0 and not shown and not caplog.text


def test_outside_a_prompt_it_only_logs(listener, shown, caplog):
    caplog.set_level("INFO")
    compiled(listener)
    compiled(listener)
    assert listener.count == 2 and not shown and caplog.text.count("compiling GPU kernels") == 1


def test_the_listener_before_hears_all_of_it(shown):
    heard = []
    told = {"src": OURS, "metadata": {"hash": 1}, "metadata_group": {}, "times": 2, "cache_hit": True}
    compiling.Listener(lambda **everything: heard.append(everything))(**told, of_a_later_triton=3)
    assert heard == [told | {"of_a_later_triton": 3}]


@pytest.fixture
def knobs(monkeypatch):
    knobs = pytest.importorskip("triton.knobs", reason="this Triton has no listeners")
    monkeypatch.setattr(knobs.compilation, "listener", print)
    compiling._listen.cache_clear()
    yield knobs
    compiling._listen.cache_clear()


def test_listens_once_and_keeps_who_listened(knobs):
    compiling.announce(CUDA)
    ours = knobs.compilation.listener
    assert isinstance(ours, compiling.Listener) and ours.before is print
    knobs.compilation.listener = chained = lambda **told: ours(**told)
    compiling.announce(CUDA)
    assert knobs.compilation.listener is chained


def test_a_processor_compiles_nothing(knobs):
    compiling.announce(torch.device("cpu"))
    assert knobs.compilation.listener is print


def test_loading_a_model_has_it_announced(monkeypatch, tmp_path):
    devices = []
    monkeypatch.setattr(compiling, "announce", devices.append)
    model.load_model(small_transformer(tmp_path / "small.safetensors"), "auto", torch.device("cpu"))
    assert devices == [torch.device("cpu")]


def test_triton_tells_of_a_kernel_that_it_compiles(pack, comfyui, tmp_path):
    pytest.importorskip("triton.knobs", reason="this Triton has no listeners")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", SCRIPT, str(pack), str(comfyui)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    hits, counts = json.loads(ran.stdout.splitlines()[-1])
    assert hits == [False, True]
    assert counts == [1, 1]
    assert ran.stderr.count("compiling GPU kernels") == 1


def test_loading_says_which_model_it_reads(shown):
    with CurrentNodeContext("a", "1"):
        loading.load(catalogue.resolve("demo", "auto", "auto"), "auto", None)
    said = [text for _, text, _ in shown]
    names = {"diffusion model": "transformer", "text encoder": "text_encoder", "VAE": "vae"}
    assert said[:3] == [f"reading the {model} demo/{folder}" for model, folder in names.items()]
    assert said[3].startswith("loaded in ") and len(said) == 4


def test_quantising_says_of_what(shown, caplog, tmp_path):
    caplog.set_level("INFO")
    checkpoint = Checkpoint.read(small_transformer(tmp_path / "small.safetensors"))
    with CurrentNodeContext("a", "1"):
        quantiser.quantised(checkpoint, "int4", torch.device("cpu"))
    before, after = (text for _, text, _ in shown)
    assert before.startswith("quantising ") and "weights of small.safetensors to int4 on cpu" in before
    assert after.startswith("quantised small.safetensors in ")
    assert before in caplog.text and after in caplog.text


def test_without_a_node_nothing_is_sent(shown, caplog):
    caplog.set_level("INFO")
    progress.tell("a word")
    assert not shown and "Z-Image-Turbo: a word" in caplog.text and progress.run() is None
