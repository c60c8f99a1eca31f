"""One sequence over several ranks: shares of it, and the same numbers as one process has, up to rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from zimage_turbo.engine import forward, sequence, turbo
from zimage_turbo.engine.group import faults
from zimage_turbo.tests.unit.engine import together

PROGRAM = Path(__file__).with_name("together.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory, comfyui):
    """Of every case, what eight processes found that were started for all of them."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(PROGRAM), str(comfyui), str(folder)]
    environment, limit = os.environ | {"OMP_NUM_THREADS": "1"}, together.WHOLE_LIMIT + 60
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("case", together.cases(), ids=lambda case: together.case_name("", *case)[8:])
@pytest.mark.parametrize("size", together.WORLD_SIZES)
def test_ranks_compute_what_one_process_does(results, size, case):
    found = results[together.case_name(size, *case)]
    assert found["error"] <= found["bound"]
    assert not found["differ"], "every rank steps the sampler: all must have the very same numbers"


def test_who_waits_for_a_rank_in_vain_says_so_within_the_limit(results):
    """Not after the half hour that torch gives a group of some ranks."""
    found = results["alone"]
    assert found["kind"] == faults.EXCHANGE and found["what"].startswith("could not exchange data with the others: ")
    assert found["seconds"] < 20


def test_ranks_compile_before_their_first_request_alone(monkeypatch):
    rehearsed = []
    monkeypatch.setattr(turbo, "rehearse", lambda function, inputs, device: rehearsed.append(device))
    joint = turbo.Joint(SimpleNamespace(device="cuda:0"), int)
    joint.prepare(torch.neg, ())
    joint.prepare(torch.neg, ())
    assert rehearsed == ["cuda:0"]


tokens = some.integers(0, 5000)


@given(tokens, tokens, some.integers(1, 8))
def test_shares_are_even_and_complete(words, picture, size):
    of_words, of_picture = sequence.runs(words, picture, size)
    for shares, count in ((of_words, words), (of_picture, picture)):
        assert [token for share in shares for token in share] == list(range(count))
        lengths = [len(share) for share in shares]
        assert len(lengths) == size and max(lengths) - min(lengths) <= 1
    sums = [len(one) + len(other) for one, other in zip(of_words, of_picture, strict=True)]
    assert max(sums) - min(sums) <= 1


def test_a_picture_of_1024_pixels_on_five_ranks():
    of_words, of_picture = sequence.runs(64, 4096, 5)
    assert [len(run) for run in of_words] == [12, 13, 13, 13, 13]
    assert [len(run) for run in of_picture] == [820, 819, 819, 819, 819]


def test_what_one_process_holds_is_the_whole():
    table = torch.randn(7, 4, 2)
    of_all, of_picture = sequence.WHOLE.angles(table, 3)
    assert of_all is table and torch.equal(of_picture, table[3:])


def test_own_angles_are_those_of_own_tokens():
    table, joined = torch.arange(20.0).view(10, 1, 2), []
    for words, picture in zip(*sequence.runs(3, 7, 4), strict=True):
        share = sequence.Share(slice(words.start, words.stop), slice(picture.start, picture.stop), None, None)
        of_all, of_picture = share.angles(table, 3)
        assert torch.equal(of_all[len(words) :], of_picture)
        joined.append(of_picture)
    assert torch.equal(torch.cat(joined), table[3:])


class Pair(sequence.Ranks):
    """The first of so many ranks, without the others."""

    def __init__(self, size, form=None):
        self.device, self.group, self.form, self.rank, self.size = torch.device("cpu"), None, form, 0, size
        self.forms = {}


def test_the_form_is_what_was_measured_for_a_size_of_that_order():
    ranks = Pair(4)
    assert ranks.form_of(1, 4160) == sequence.Form(gather=False)
    ranks.forms[sequence.size_class(1, 4160)] = sequence.Form(gather=True, stages=2)
    assert ranks.form_of(1, 4200) == sequence.Form(gather=True, stages=2)
    assert ranks.form_of(2, 4160) == ranks.form_of(1, 1088) == sequence.Form(gather=False)
    assert Pair(2).form_of(1, 4160) == sequence.Form(gather=True)
    assert Pair(2, sequence.Form(False, 2)).form_of(1, 4160) == sequence.Form(False, 2)


def patched(linear):
    linear.weight_function = [lambda weight: weight]


def with_bias(linear):
    linear.bias = torch.nn.Parameter(torch.zeros(960), requires_grad=False)


def bypassed(linear):
    linear.forward = lambda x: type(linear).forward(linear, x)


def in_bf16(linear):
    linear.weight = torch.nn.Parameter(linear.weight.bfloat16(), requires_grad=False)


@pytest.mark.parametrize("change", [patched, with_bias, bypassed, in_bf16])
def test_queries_are_projected_apart_only_from_a_weight_as_it_lies(change):
    linear, y = together.odd_module().layers[0].attention.qkv, torch.randn(1, 3, 320)
    assert forward.splits(linear, y)
    some = forward.project_some(linear, slice(320, 960), y)
    assert torch.allclose(some, linear(y)[..., 320:], atol=1e-6)
    change(linear)
    assert not forward.splits(linear, y)
