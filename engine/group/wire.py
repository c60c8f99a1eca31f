"""What the coordinator and the ranks of a group send each other: trees of plain values and tensors, as safetensors.

A tree is a dict with string keys, a list or tuple (which arrives as a list), a string, number, bool, None or tensor.
Its tensors are those of a safetensors file in memory, named by number; the rest is JSON in the file's metadata, under
``tree``, with ``{"$": name}`` in place of each tensor. In place of one that the processes share there is
``{"$shared": …}``, which says where it lies. Nothing that is received is ever run. Such a file is the length
of a header in 8 bytes, little-endian, the header in JSON, and the tensors' bytes one behind the other; it is put
together here because the library's way copies a picture of 1024x1024 four times, for which a GPU would wait.

Answers are streams of frames: a byte that says the kind, the length of a body in 8 bytes, little-endian, and the body.
"""

import dataclasses
import json
import struct
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from .shared import Parcel, Reference, opened

Tree = Any
DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
PROGRESS, RESULT, ERROR = b"P", b"R", b"E"
HEAD = struct.Struct("<cQ")
SLICE = 1 << 20  # of what is written at once: a long write would hold up all others of the event loop
LARGE = 1 << 16  # bytes, from which on a tensor is rather shared than sent
_TENSOR, _SHARED, _TREE = "$", "$shared", "tree"
_LENGTH = struct.Struct("<Q")


class Unsendable(TypeError):
    """A value that is neither plain nor a tensor. The message says where it stands in the tree."""


def pack(tree: Tree, parcel: Parcel | None = None) -> bytes:
    """The body of a message. Tensors on a GPU are copied to main memory. Raises Unsendable.

    parcel: takes large tensors, and must be open when the message is unpacked. Without one nothing can be shared: all
    are in the body, and a reference arrives as None.
    """
    packer = _Packer(parcel)
    plain = packer.plain(tree, "message")
    header: dict[str, Any] = {"__metadata__": {_TREE: json.dumps(plain)}}
    end = 0
    for name, tensor in enumerate(packer.tensors):
        start, end = end, end + tensor.nbytes
        header[str(name)] = {"dtype": DTYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": (start, end)}
    said = json.dumps(header).encode()
    said += b" " * (-len(said) % _LENGTH.size)  # tensors begin where a processor likes to read them
    contents = (tensor.reshape(-1).view(torch.uint8).numpy().data for tensor in packer.tensors)
    return b"".join((_LENGTH.pack(len(said)), said, *contents))


def unpack(body: bytes) -> Tree:
    """The tree of a body, its tensors in main memory. Raises ValueError for a body that is not one."""
    try:
        (length,) = _LENGTH.unpack_from(body)
        header = json.loads(body[_LENGTH.size : _LENGTH.size + length])
        return _with_tensors(json.loads(header["__metadata__"][_TREE]), load(body))
    except (struct.error, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"A body of {len(body)} bytes is not a message: {error}") from error


def frame(kind: bytes, body: bytes) -> Iterator[bytes | memoryview]:
    """A frame of an answer, in pieces."""
    yield HEAD.pack(kind, len(body))
    yield from slices(body)


def slices(body: bytes) -> Iterator[memoryview]:
    whole = memoryview(body)
    return (whole[start : start + SLICE] for start in range(0, len(whole), SLICE))


class _Packer:
    """Makes plain trees of trees. tensors: those that references are to, in main memory."""

    def __init__(self, parcel: Parcel | None):
        self.parcel, self.tensors = parcel, list[torch.Tensor]()

    def plain(self, value: Tree, place: str) -> Tree:
        if isinstance(value, torch.Tensor):
            return self._reference(value, place)
        if isinstance(value, Reference):
            return {_SHARED: dataclasses.asdict(value)} if self.parcel is not None else None
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str) or key in (_TENSOR, _SHARED):
                    named = f"'{_TENSOR}' and '{_SHARED}'"
                    raise Unsendable(f"{place} has the key {key!r}; keys are strings other than {named}.")
            return {key: self.plain(each, f"{place}[{key!r}]") for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self.plain(each, f"{place}[{number}]") for number, each in enumerate(value)]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise Unsendable(f"{place} is of type {type(value).__name__}, which cannot be sent to another process.")

    def _reference(self, value: torch.Tensor, place: str) -> Tree:
        if value.dtype not in DTYPES:
            raise Unsendable(f"{place} is a tensor of {value.dtype}; those that can be sent are {', '.join(_names())}.")
        if self.parcel is not None and value.nbytes >= LARGE:
            return {_SHARED: dataclasses.asdict(self.parcel.put(value))}
        self.tensors.append(value.detach().cpu().contiguous())
        return {_TENSOR: str(len(self.tensors) - 1)}


def _names() -> list[str]:
    return [str(dtype).removeprefix("torch.") for dtype in DTYPES]


def _with_tensors(value: Tree, tensors: dict[str, torch.Tensor]) -> Tree:
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        if _SHARED in value:
            return opened(Reference(**value[_SHARED]))
        return {key: _with_tensors(each, tensors) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_tensors(each, tensors) for each in value]
    return value
