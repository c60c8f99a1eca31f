"""Operations of ranks for tests: some that work, and each way in which one may not."""

import time
from pathlib import Path

import torch
import torch.distributed as dist


def echo(rank, job):
    return {"rank": rank.number, "size": rank.size, "request": job.request}


def steps(rank, job):
    """As a sampler does, with a look for a cancel between steps; all ranks together, where that is wanted."""
    for step in range(job.request["steps"]):
        if job.request.get("together"):
            dist.barrier()
        job.check()
        job.tell({"step": step})
        time.sleep(job.request["seconds"])
    return {"rank": rank.number}


def meet(rank, job):
    """An exchange between all ranks."""
    total = torch.tensor([rank.number + 1.0])
    dist.all_reduce(total)
    return {"total": total}


def fail(rank, job):
    """Raise one error after another, on one rank. Others wait for it, if they do this together."""
    if rank.number == job.request["rank"]:
        errors = job.request["errors"][times(job.request.get("marker")) :]
        if errors:
            raise ERRORS[errors[0]]
    if job.request.get("together"):
        dist.barrier()
    return {"rank": rank.number}


def hang(rank, job):
    """Work on without a look for a cancel; on one rank, and once, where these are given."""
    if rank.number == job.request.get("rank", rank.number) and times(job.request.get("marker")) == 0:
        time.sleep(job.request["seconds"])


def times(marker):
    """How often this was called with that file before, also by processes that are gone; without a file never."""
    if marker is None:
        return 0
    with Path(marker).open("a") as file:
        file.write("x")
        return file.tell() - 1


def remember(rank, job):
    rank.models[job.request["key"]] = job.request["value"]


def recall(rank, job):
    return rank.models.get(job.request["key"])


ERRORS = {
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "exception": KeyError("lost"),
    "refused": ValueError("seed is -1, but seeds begin at 0."),
}
OPERATIONS = {
    "echo": echo,
    "steps": steps,
    "meet": meet,
    "fail": fail,
    "hang": hang,
    "remember": remember,
    "recall": recall,
}
