"""Memory that the processes of a group on one machine share, for what is too large to be sent.

It is in files without a name, which ranks open through /proc while the coordinator holds them open. They are gone with
the last process that maps them, however that ends: nothing is left in /dev/shm, whose size, small in containers, is no
limit either. Ranks that cannot open them, as on another machine, are sent everything.
"""

import hashlib
import os
from dataclasses import dataclass

import torch

_NAME = "z-image-turbo"
_ALIGNED = 64


@dataclass(frozen=True)
class Reference:
    """A tensor that another process shares: what `opened` needs. file: its descriptor there; start: in bytes."""

    pid: int
    file: int
    start: int
    dtype: str
    shape: tuple[int, ...]
    writable: bool


def possible() -> bool:
    """Whether this system has such files."""
    return hasattr(os, "memfd_create")


class _File:
    """One of them, open until `close`; what is mapped of it then stays."""

    def __init__(self) -> None:
        self.file = os.fdopen(os.memfd_create(_NAME), "r+b")

    def reference(self, start: int, shape: tuple[int, ...], dtype: torch.dtype, writable: bool) -> Reference:
        name = str(dtype).removeprefix("torch.")
        return Reference(os.getpid(), self.file.fileno(), start, name, tuple(shape), writable)

    def close(self) -> None:
        self.file.close()


class Parcel(_File):
    """Tensors that other processes are to read. A process that writes to one changes its own copy alone."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[torch.Tensor, Reference]] = {}  # by identity, which a kept tensor has alone

    def put(self, tensor: torch.Tensor) -> Reference:
        """Add a tensor and say where it lies; the same one is added once, as a prompt that several pictures have.

        Raises OSError when there is no memory left.
        """
        if id(tensor) not in self._known:
            self._known[id(tensor)] = tensor, self._added(tensor.detach().cpu().contiguous())
        return self._known[id(tensor)][1]

    def close(self) -> None:
        super().close()
        self._known.clear()

    def _added(self, tensor: torch.Tensor) -> Reference:
        start = -(-self.file.seek(0, os.SEEK_END) // _ALIGNED) * _ALIGNED
        self.file.seek(start)
        self.file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        self.file.flush()
        return self.reference(start, tensor.shape, tensor.dtype, writable=False)


class Shared(_File):
    """A tensor, zeros at first, that other processes write to. `tensor` outlives `close`, after which they cannot."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        """Raises OSError when there is no memory left."""
        super().__init__()
        self.file.truncate(torch.Size(shape).numel() * dtype.itemsize)
        self.tensor = _tensor(self.file.fileno(), self.reference(0, shape, dtype, writable=True))

    def row(self, number: int) -> Reference:
        """Of the tensor's first dimension, which it keeps with length 1."""
        row = self.tensor[number : number + 1]
        return self.reference(row.storage_offset() * row.itemsize, row.shape, row.dtype, writable=True)


def opened(reference: Reference) -> torch.Tensor:
    """The tensor in this process. Raises ValueError when there is no such memory any more, or it is another's."""
    path = f"/proc/{reference.pid}/fd/{reference.file}"
    try:
        if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
            raise ValueError(f"{path} is not the group's")
        descriptor = os.open(path, os.O_RDWR)
    except OSError as error:
        raise ValueError(f"shared memory cannot be opened: {error}") from error
    try:
        return _tensor(descriptor, reference)
    finally:
        os.close(descriptor)


def _tensor(descriptor: int, reference: Reference) -> torch.Tensor:
    dtype = getattr(torch, reference.dtype)
    end = reference.start + torch.Size(reference.shape).numel() * dtype.itemsize
    if end > os.fstat(descriptor).st_size:  # torch would make it longer
        raise ValueError(f"shared memory ends before byte {end}")
    # Not shared: what is written to it is a copy of this process's own.
    whole = torch.from_file(f"/proc/self/fd/{descriptor}", shared=reference.writable, size=end, dtype=torch.uint8)
    return whole[reference.start :].view(dtype).view(reference.shape)


def probe(token: str) -> tuple[Parcel, Reference]:
    """What a rank that knows the token can tell by whether it `reaches` it; to be closed."""
    parcel = Parcel()
    return parcel, parcel.put(_digest(token))


def reaches(reference: Reference, token: str) -> bool:
    """Whether this process can open what the group's coordinator shares."""
    try:
        return torch.equal(opened(reference), _digest(token))
    except ValueError:
        return False


def _digest(token: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(hashlib.sha256(token.encode()).digest()), dtype=torch.uint8)
