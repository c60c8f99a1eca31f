"""Attention measured at first use and remembered on disk."""

import contextlib
import math

import pytest
import torch

from zimage_turbo.engine import forward, measured, sequence, trial
from zimage_turbo.kernels import registry
from zimage_turbo.kernels.attention import ATTENTION, AttentionRequest
from zimage_turbo.kernels.registry import Choices
from zimage_turbo.tests.gpu.kernels import forgotten
from zimage_turbo.tests.unit.engine import together

CPU = torch.device("cpu")


def breaks(q, k, v, lengths):
    raise RuntimeError("no such GPU")


FUNCTIONS = {"breaks": breaks, "works": torch.nn.functional.scaled_dot_product_attention}


@pytest.fixture(autouse=True)
def _nothing_remembered():
    measured.attention_backend.cache_clear()
    yield
    measured.attention_backend.cache_clear()


def test_the_processor_is_not_measured(monkeypatch):
    monkeypatch.setattr(measured, "choices_file", lambda: pytest.fail("nothing is to be remembered"))
    assert measured.attention_backend("auto", CPU, torch.float32, 2, 64, 0.0) == "sdpa"
    with pytest.raises(ValueError, match="cudnn: needs an NVIDIA GPU"):
        measured.attention_backend("cudnn", CPU, torch.float32, 2, 64, 0.0)


@pytest.mark.parametrize("spoilt", ["", "[1]", '{"a": 1}', "{"])
def test_a_spoilt_file_is_measured_again(tmp_path, caplog, spoilt):
    file = tmp_path / "attention.json"
    file.write_text(spoilt)
    assert measured.read(file).names == {}
    assert "measured again" in caplog.text and str(file) in caplog.text


def test_choices_come_back(tmp_path):
    file = tmp_path / "folder" / "attention.json"
    assert measured.read(file).names == {}
    measured.write(file, Choices({"one": "cudnn"}))
    measured.write(file, Choices({"one": "cudnn", "two": "triton"}))
    assert measured.read(file).names == {"one": "cudnn", "two": "triton"}
    assert [each.name for each in file.parent.iterdir()] == ["attention.json"]


@pytest.fixture
def chosen(tmp_path, monkeypatch):
    """Chooses on a processor that passes for a GPU of its own kind, where only "works" and another backend can run at
    all; and gives what is remembered of that."""
    monkeypatch.setattr(measured, "choices_file", lambda: tmp_path / "attention.json")
    monkeypatch.setattr(trial, "TOKENS", 64)
    monkeypatch.setattr(AttentionRequest, "key", "this machine")
    monkeypatch.setattr(measured, "measured_on", lambda device: True)

    def choose(functions, fallbacks=()):
        fitting = {
            name: registry.Backend(name, function, registry.no_refusal, fallback=name in fallbacks)
            for name, function in functions.items()
        }
        monkeypatch.setattr(measured.ATTENTION, "backends", fitting)
        assert measured.attention_backend("auto", CPU, torch.float32, 2, 64, 0.0) == "works"
        return measured.read(tmp_path / "attention.json").names

    return choose


@pytest.mark.parametrize("fallbacks", [(), ("works",)], ids=["beside it", "a fallback"])
def test_a_backend_that_fails_is_left_out(chosen, caplog, fallbacks):
    assert list(chosen(FUNCTIONS, fallbacks).values()) == ["works"]
    assert "attention by breaks fails on cpu: no such GPU" in caplog.text


def test_what_failed_for_want_of_memory_is_measured_again(chosen):
    def short(*_):
        raise torch.OutOfMemoryError("a want of memory")

    assert chosen(FUNCTIONS | {"breaks": short}) == {}


class Third(sequence.Ranks):
    """The third of four ranks, without the others, whose times are `theirs`."""

    def __init__(self, theirs, form=None):
        self.device, self.group, self.form, self.rank, self.size = CPU, None, form, 2, 4
        self.forms, self.theirs = {}, theirs

    def slowest(self, values):
        return [max(each) for each in zip(values, self.theirs, strict=True)]


def settle(monkeypatch, ranks, own):
    """What is measured while a form is settled twice for one size, and once for twice as many tokens."""
    module, asked = together.odd_module(), []
    monkeypatch.setattr(measured, "measured_on", lambda device: True)
    monkeypatch.setattr(measured, "replay_seconds", lambda run, _: asked.append(run) or own[len(asked) % len(own) - 1])
    compute = forward.Compute(torch.float32, ranks=ranks)
    for rows in (8, 8, 16):
        measured.settle_form(module, compute, 1, 5, forward.rotation_table(module, 5, rows, 8, CPU), int)
    return len(asked)


def test_ranks_settle_for_the_form_whose_slowest_rank_is_fastest(monkeypatch):
    own, theirs = [3.0, 1.0, 4.0, 2.0, 9.0, 9.0], [1.0, 5.0, 4.0, 3.5, 9.0, 9.0]
    ranks = Third(theirs)
    assert settle(monkeypatch, ranks, own) == 2 * len(sequence.FORMS)
    assert ranks.form_of(1, 69) == ranks.form_of(1, 133) == sequence.FORMS[0]


@pytest.mark.parametrize("least", [int, lambda own: 0], ids=["here", "by another rank"])
def test_a_form_that_cannot_be_captured_is_never_fastest(monkeypatch, least):
    calls = []

    def run():
        calls.append(None)
        if least is int and len(calls) > 1:  # the first call is not captured
            raise RuntimeError("operation not permitted when stream is capturing")

    for name in ("CUDAGraph", "Stream"):
        monkeypatch.setattr(torch.cuda, name, object)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    assert measured.replay_seconds(run, least) == math.inf


def test_a_form_that_is_given_is_not_measured(monkeypatch):
    assert settle(monkeypatch, Third([], sequence.FORMS[1]), [1.0]) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("allowed_error", [0.0, 0.06])
def test_measured_once(tmp_path, monkeypatch, allowed_error):
    file, counted = tmp_path / "attention.json", []
    monkeypatch.setattr(measured, "choices_file", lambda: file)
    timing = measured.timing
    monkeypatch.setattr(measured, "timing", lambda *given: counted.append(given) or timing(*given))
    asked = "auto", torch.device("cuda"), torch.bfloat16, 30, 128, allowed_error
    first = measured.attention_backend(*asked)
    assert ATTENTION.backends[first].error <= allowed_error
    assert first in measured.read(file).names.values()
    calls = len(counted)
    measured.attention_backend.cache_clear()
    assert measured.attention_backend(*asked) == first
    assert calls > 1 and len(counted) == calls


@pytest.fixture
def foreseen(tmp_path, monkeypatch):
    """What is compiled ahead of a measurement on a processor that passes for a GPU; and where choices are kept."""
    asked = []
    monkeypatch.setattr(measured, "choices_file", lambda: tmp_path / "attention.json")
    monkeypatch.setattr(AttentionRequest, "key", "this machine")
    monkeypatch.setattr(measured, "measured_on", lambda device: True)
    monkeypatch.setattr(measured, "compiling", lambda *given: asked.append(given))
    backends = {name: registry.Backend(name, breaks, registry.no_refusal) for name in ("one", "another")}
    monkeypatch.setattr(measured.ATTENTION, "backends", backends)
    return asked


def test_what_will_be_measured_is_compiled_ahead(foreseen):
    given = CPU, torch.float32, 2, 64, 0.0
    measured.foresee_attention("auto", *given)
    assert foreseen == [given]


def test_what_is_named_or_known_is_not_compiled_ahead(foreseen):
    given = CPU, torch.float32, 2, 64, 0.0
    measured.foresee_attention("one", *given)
    measured.write(measured.choices_file(), Choices({"attention: this machine; of one, another": "another"}))
    measured.foresee_attention("auto", *given)
    assert not foreseen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_what_is_measured_is_compiled_side_by_side(tmp_path, monkeypatch):
    """Also what comes after a backend that fails."""
    asked = AttentionRequest(
        device=torch.device("cuda:0"), dtype=torch.bfloat16, batch=1, heads=30, tokens=64, keys=64, head_dim=128
    )
    ours = [name for name, reason in ATTENTION.refusals(asked).items() if "triton" in name and not reason]
    if not ours:
        pytest.skip("none of our kernels runs here")
    monkeypatch.setattr(ATTENTION, "backends", dict(ATTENTION.backends))
    ATTENTION.register("breaks", breaks, registry.no_refusal, preferred=True)
    monkeypatch.setattr(measured, "choices_file", lambda: tmp_path / "attention.json")
    measured.attention_backend.cache_clear()
    trial.compiling.cache_clear()
    trial.compiled.cache_clear()
    made = forgotten(monkeypatch)
    assert measured.attention_backend("auto", torch.device("cuda:0"), torch.bfloat16, 30, 128, 0.06) != "breaks"
    measured.attention_backend.cache_clear()
    assert made and all(by_thread for _, by_thread in made)
