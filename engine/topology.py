"""How a machine's GPUs are linked, as its driver says: which pairs by NVLink, and at which processor each lies."""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import pynvml
import torch


@dataclass(frozen=True)
class Gpu:
    """index: CUDA's; numa: the node of processor memory next to it, None where unknown."""

    index: int
    uuid: str
    name: str
    numa: int | None


@dataclass(frozen=True)
class Topology:
    """GPUs, and the pairs of their indices (lower first) between which NVLink and peer access work. known: whether the
    driver said so."""

    gpus: tuple[Gpu, ...]
    nvlink: frozenset[tuple[int, int]] = frozenset()
    peers: frozenset[tuple[int, int]] = frozenset()
    known: bool = True

    def islands(self) -> tuple[tuple[int, ...], ...]:
        """Indices that NVLink joins, each island sorted, the largest first; a GPU without links is one by itself.

        Within an island every pair has links of its own or through a switch: a GPU joins the first island in which it
        is linked to all.
        """
        found: list[list[int]] = []
        for gpu in self.gpus:
            for island in found:
                if all((other, gpu.index) in self.nvlink for other in island):
                    island.append(gpu.index)
                    break
            else:
                found.append([gpu.index])
        return tuple(sorted(map(tuple, found), key=lambda island: (-len(island), island)))

    def described(self) -> str:
        """For the log, e.g. '4 GPUs: 0 1 by NVLink, 2 3 by NVLink; memory node 0: 0 1, 1: 2 3'."""
        count = f"{len(self.gpus)} GPU{'' if len(self.gpus) == 1 else 's'}"
        if len(self.gpus) < 2:
            return count
        if not self.known:
            return f"{count}, links unknown"
        many = [island for island in self.islands() if len(island) > 1]
        linked = ": " + ", ".join(f"{_listed(island)} by NVLink" for island in many) if many else " without NVLink"
        peers = "; peer access by PCIe" if self.peers - self.nvlink else ""
        return f"{count}{linked}{peers}{self._nodes()}"

    def _nodes(self) -> str:
        """Which GPUs lie at which node of processor memory, where there are several."""
        nodes: dict[int | None, list[int]] = {}
        for gpu in self.gpus:
            nodes.setdefault(gpu.numa, []).append(gpu.index)
        if len(nodes) < 2 or None in nodes:
            return ""
        return "; memory node " + ", ".join(f"{node}: {_listed(indices)}" for node, indices in sorted(nodes.items()))

    def as_dict(self) -> dict[str, object]:
        """JSON-ready, for /health: in words; islands; pairs with peer access; and of each GPU its memory node."""
        return {
            "described": self.described(),
            "nvlink_islands": [list(island) for island in self.islands()],
            "peer_access": [list(pair) for pair in sorted(self.peers)],
            "memory_nodes": [gpu.numa for gpu in self.gpus],
        }


def _listed(indices: Sequence[int]) -> str:
    return " ".join(map(str, indices))


def read() -> Topology:
    """Of the GPUs that CUDA shows to this process, in its order; without links where the driver says nothing of them,
    as of a part of a GPU (MIG), and in containers that lack its library."""
    found = list(map(torch.cuda.get_device_properties, range(torch.cuda.device_count())))
    uuids = tuple(f"GPU-{each.uuid}" for each in found)
    try:
        return described_by_driver(uuids)
    except pynvml.NVMLError as error:
        logging.warning("Z-Image-Turbo: the driver does not say how GPUs are linked: %s", error)
        named = zip(uuids, found, strict=True)
        gpus = tuple(Gpu(index, uuid, each.name, None) for index, (uuid, each) in enumerate(named))
        return Topology(gpus, known=False)


@functools.cache
def described_by_driver(uuids: tuple[str, ...]) -> Topology:
    """Of the GPUs with these ids, which the driver may number otherwise than CUDA. Raises pynvml.NVMLError."""
    if not uuids:
        return Topology(())
    pynvml.nvmlInit()
    try:
        handles = dict(enumerate(map(pynvml.nvmlDeviceGetHandleByUUID, uuids)))
        pairs = [(low, high) for low in handles for high in handles if low < high]
        return Topology(
            tuple(_gpu(index, handle) for index, handle in handles.items()),
            frozenset(pair for pair in pairs if _joined(handles, pair, pynvml.NVML_P2P_CAPS_INDEX_NVLINK)),
            frozenset(pair for pair in pairs if _joined(handles, pair, pynvml.NVML_P2P_CAPS_INDEX_READ)),
        )
    finally:
        pynvml.nvmlShutdown()


def _gpu(index: int, handle) -> Gpu:
    return Gpu(index, pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle), _numa(handle))


def _numa(handle) -> int | None:
    try:
        return pynvml.nvmlDeviceGetNumaNodeId(handle)
    except pynvml.NVMLError:  # drivers before 535, machines with one node, virtual machines
        return None


def _joined(handles: dict, pair: tuple[int, int], capability: int) -> bool:
    one, other = (handles[index] for index in pair)
    try:
        return pynvml.nvmlDeviceGetP2PStatus(one, other, capability) == pynvml.NVML_P2P_STATUS_OK
    except pynvml.NVMLError:  # what the driver cannot say is no link that a plan may lean on
        return False
