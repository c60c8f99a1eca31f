"""Messages between the processes of a group: what is sent arrives, and nothing else is taken for one."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from safetensors.torch import save

from zimage_turbo.engine.group import wire

plain = some.none() | some.booleans() | some.integers() | some.floats(allow_nan=False) | some.text()
keys = some.text().filter(lambda key: key not in ("$", "$shared"))
trees = some.recursive(plain, lambda inner: some.lists(inner, max_size=4) | some.dictionaries(keys, inner, max_size=4))


@given(trees)
def test_plain_values_arrive(tree):
    assert wire.unpack(wire.pack(tree)) == tree


@pytest.mark.parametrize("dtype", wire.DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (1, 16, 5, 7)])
def test_tensors_arrive_to_the_bit(dtype, shape):
    sent = (torch.randn(shape) * 40).abs().to(dtype)
    (arrived,) = wire.unpack(wire.pack([sent]))
    assert arrived.dtype == dtype and arrived.shape == sent.shape
    assert torch.equal(arrived.view(torch.uint8) if shape else arrived, sent.view(torch.uint8) if shape else sent)


def test_a_conditioning_arrives():
    states, mask = torch.randn(1, 7, 8), torch.ones(1, 7)
    (entry,) = wire.unpack(wire.pack([[states, {"attention_mask": mask, "pooled_output": None, "strength": (1, 0.5)}]]))
    assert torch.equal(entry[0], states) and torch.equal(entry[1]["attention_mask"], mask)
    assert entry[1]["pooled_output"] is None and entry[1]["strength"] == [1, 0.5]


def test_tensors_that_share_memory_and_are_not_contiguous():
    whole = torch.arange(12.0).view(3, 4)
    sent = [whole, whole[1:], whole.t(), whole.view(-1), whole[:, :2], whole.expand(2, 3, 4)]
    for one, other in zip(sent, wire.unpack(wire.pack(sent)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("tree", "place"),
    [
        ({"hooks": [1, object()]}, "message['hooks'][1] is of type object"),
        ({"a": {2: "b"}}, "message['a'] has the key 2"),
        ([{"$": 1}], "message[0] has the key '$'"),
        ({"uuid": b"bytes"}, "message['uuid'] is of type bytes"),
        ([torch.zeros(2, dtype=torch.complex64)], "message[0] is a tensor of torch.complex64; those that can be sent"),
    ],
)
def test_what_cannot_be_sent_is_named(tree, place):
    with pytest.raises(wire.Unsendable) as raised:
        wire.pack(tree)
    assert place in str(raised.value)


def bodies():
    whole = wire.pack({"x": torch.ones(4)})
    return {
        "nothing": b"",
        "text": b"hello, this is no message at all",
        "cut off": whole[:-3],
        "length beyond the end": b"\xff" * 8 + whole[8:],
        "pickle": pickle.dumps({"x": 1}),
        "a weight file": save({"x": torch.ones(4)}),
        "a tensor that is not there": save({}, {"tree": '{"$": "7"}'}),
        "a name that is none": save({}, {"tree": '{"$": [1]}'}),
    }


@pytest.mark.parametrize("name", bodies())
def test_what_is_no_message_is_refused(name):
    with pytest.raises(ValueError, match="is not a message"):
        wire.unpack(bodies()[name])


def test_a_frame_is_its_kind_length_and_body():
    body = bytes(wire.SLICE + 5)
    head, *pieces = wire.frame(wire.RESULT, body)
    assert wire.HEAD.unpack(head) == (b"R", len(body))
    assert [len(piece) for piece in pieces] == [wire.SLICE, 5]
    assert b"".join(pieces) == body
