"""Memory that processes share: seen by others while it is open, theirs to write where it is meant so, and then gone."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from zimage_turbo.engine.group import shared, wire
from zimage_turbo.engine.group.shared import Parcel, Reference, Shared

pytestmark = pytest.mark.skipif(not shared.possible(), reason="this system has no files without a name")


def descriptors():
    return set(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn])
def test_a_parcel_holds_tensors_to_the_bit(dtype):
    sent = [(torch.randn(shape) * 40).abs().to(dtype) for shape in ((3, 5), (1,), (2, 7, 1, 3))]
    before = descriptors()
    parcel = Parcel()
    references = [parcel.put(tensor) for tensor in sent]
    arrived = [shared.opened(reference) for reference in references]
    parcel.close()
    assert descriptors() == before, "what is mapped needs no file"
    for one, other in zip(sent, arrived, strict=True):
        assert one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_a_parcel_holds_a_tensor_once_that_is_put_twice():
    parcel, (one, other) = Parcel(), torch.ones(2, 4)
    assert parcel.put(one) == parcel.put(one) != parcel.put(other)
    parcel.close()


def test_who_reads_a_parcel_cannot_change_it():
    parcel = Parcel()
    reference = parcel.put(torch.ones(4))
    shared.opened(reference).add_(1)
    assert shared.opened(reference).tolist() == [1, 1, 1, 1]
    parcel.close()


def test_another_process_writes_where_it_is_wanted():
    room = Shared((3, 2, 2), torch.float32)
    code = (
        "import dataclasses, importlib.util, sys, torch\n"
        "spec = importlib.util.spec_from_file_location('shared', sys.argv[1])\n"
        "shared = sys.modules['shared'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(shared)\n"
        "shared.opened(shared.Reference(**eval(sys.argv[2]))).copy_(torch.full((1, 2, 2), 7.0))\n"
    )
    row = repr(dataclasses.asdict(room.row(1)))
    subprocess.run([sys.executable, "-c", code, shared.__file__, row], check=True)
    assert room.tensor[:, 0, 0].tolist() == [0, 7, 0]
    reference = room.row(0)
    room.close()
    assert room.tensor.sum() == 28, "it outlives what ranks can open"
    with pytest.raises(ValueError, match="cannot be opened"):
        shared.opened(reference)


def test_no_other_file_is_opened(tmp_path):
    path = tmp_path / "precious"
    path.write_bytes(b"precious")
    with path.open("r+b") as file:
        reference = Reference(os.getpid(), file.fileno(), 0, "uint8", (64,), True)
        with pytest.raises(ValueError, match="is not the group's"):
            shared.opened(reference)
    assert path.read_bytes() == b"precious"
    room = Shared((4,), torch.uint8)
    with pytest.raises(ValueError, match="ends before byte 5"):
        shared.opened(dataclasses.replace(room.row(0), shape=(5,)))
    room.close()


def test_whether_a_process_reaches_it():
    parcel, reference = shared.probe("secret")
    assert shared.reaches(reference, "secret") and not shared.reaches(reference, "another group's")
    parcel.close()
    assert not shared.reaches(reference, "secret")


def test_large_tensors_of_a_message_go_into_its_parcel():
    large, small, room = torch.randn(1 << 15), torch.ones(5), Shared((2, 3), torch.float32)
    message = {"x": [large, small], "into": room.row(1)}
    parcel = Parcel()
    body = wire.pack(message, parcel)
    assert len(body) < 2000
    arrived = wire.unpack(body)
    parcel.close()
    assert torch.equal(arrived["x"][0], large) and torch.equal(arrived["x"][1], small)
    arrived["into"].fill_(2)
    assert room.tensor.tolist() == [[0, 0, 0], [2, 2, 2]]
    room.close()
    assert wire.unpack(wire.pack(message))["into"] is None, "nothing is shared with those that cannot open it"
    with pytest.raises(ValueError, match="is not a message"):
        wire.unpack(body)
