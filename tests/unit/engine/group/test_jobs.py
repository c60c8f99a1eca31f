"""What a rank says of a job's end."""

import types

import pytest
import torch

from zimage_turbo.engine.group import faults, jobs, wire

OF_GLOO = "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 2000ms for recv operation to complete"
ENDS = [
    (torch.OutOfMemoryError("CUDA out of memory."), faults.MEMORY, "ran out of memory: CUDA out of memory."),
    (MemoryError(), faults.MEMORY, "ran out of memory: MemoryError"),
    (RuntimeError("CUDA error: an illegal access\nmore"), faults.CUDA, "had a CUDA error: CUDA error"),
    (torch.distributed.DistBackendError("NCCL error: remote process exited, CUDA driver 13"), faults.EXCHANGE, "NCCL"),
    (RuntimeError(OF_GLOO), faults.EXCHANGE, f"could not exchange data with the others: {OF_GLOO}"),
    (RuntimeError("Application timeout caused pair closure"), faults.EXCHANGE, "could not exchange data"),
    (KeyError("lost"), faults.EXCEPTION, "raised KeyError: 'lost'"),
    (SystemExit(3), faults.EXCEPTION, "raised SystemExit: 3"),
    (ValueError("seed is -1."), jobs.REFUSED, "seed is -1."),
]


def end_of(work):
    loop = types.SimpleNamespace(call_soon_threadsafe=lambda function, *given: function(*given))
    job = jobs.Job("0", "draw", None, loop)
    job.run(work)
    frames = [job.frames.get_nowait() for _ in range(job.frames.qsize())]
    assert frames.pop() is None
    return frames


def raising(error):
    def work(job):
        raise error

    return work


@pytest.mark.parametrize(("error", "kind", "words"), ENDS, ids=lambda each: type(each).__name__)
def test_what_went_wrong_is_told_from_the_error(error, kind, words):
    ((frame, body),) = end_of(raising(error))
    told = wire.unpack(body)
    assert frame == wire.ERROR and told["kind"] == kind and words in told["what"]


def test_one_that_is_cancelled_says_so():
    def work(job):
        job.cancel()
        job.check()

    ((frame, body),) = end_of(work)
    assert frame == wire.ERROR and wire.unpack(body)["kind"] == jobs.CANCELLED


def test_a_result_that_cannot_be_sent_is_an_error():
    ((frame, body),) = end_of(lambda job: {"model": object()})
    assert frame == wire.ERROR and "message['model'] is of type object" in wire.unpack(body)["what"]
