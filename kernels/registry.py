"""Backends of an op by name: which can run a request, which is preferred, and why the others cannot.

The module of an op makes one `Registry` and registers its backends in order of preference. A user adds one likewise,
without touching this pack's files:

    from zimage_turbo.kernels import attention

    attention.ATTENTION.register(
        "mine",
        my_attention,                                                # takes what the op's own backends take
        lambda request: None if request.head_dim == 128 else "needs a head dimension of 128",
        error=0.01,                                                  # only where the result is not exact
    )

`my_attention` can then be chosen by its name, and takes part in "auto": with `preferred=True` before all others, else
where those before it refuse, or where a measurement finds it faster; with `fallback=True` only where no other can run.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

OLDEST = (7, 0)  # what Triton compiles for


@dataclass(frozen=True)
class Request:
    """What an op is asked to run on. An op whose backends decide by more than this has a subclass."""

    device: torch.device
    quantise: bool = False

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability of this request's own GPU; (0, 0) on the CPU."""
        return capability(self.device)

    @property
    def key(self) -> str:
        """What a measured choice is remembered by: the machine's part and the request's, as text."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return f"{name}, quantise={self.quantise}"


@dataclass(frozen=True, kw_only=True)
class WeightRequest(Request):
    """Work on a weight [outputs, columns] that gives numbers of a dtype."""

    dtype: torch.dtype
    outputs: int
    columns: int

    @property
    def key(self) -> str:
        return f"{super().key}, {self.dtype}, {self.outputs}x{self.columns}"


@dataclass(frozen=True, kw_only=True)
class ProductRequest(WeightRequest):
    """The product of [rows, columns] with a weight [outputs, columns], in a dtype."""

    rows: int

    @property
    def key(self) -> str:
        return f"{super().key}, {self.rows} rows"


# A forward makes the same few requests hundreds of times, and to make one takes longer than to find it.
@functools.lru_cache(maxsize=1024)
def weight_request(device: torch.device, dtype: torch.dtype, outputs: int, columns: int) -> WeightRequest:
    return WeightRequest(device, dtype=dtype, outputs=outputs, columns=columns)


@functools.lru_cache(maxsize=1024)
def product_request(device: torch.device, dtype: torch.dtype, rows: int, outputs: int, columns: int) -> ProductRequest:
    return ProductRequest(device, dtype=dtype, outputs=outputs, columns=columns, rows=rows)


@dataclass(frozen=True)
class Backend:
    """One way to run an op. `error`: its relative error beyond the rounding of its result (0: exact). `fallback`: taken
    by "auto" only where no other runs, as is right for one that may run as any of the others."""

    name: str
    function: Callable
    refusal: Callable[[Request], str | None]
    error: float = 0.0
    fallback: bool = False


class Choices:
    """Names measured to be fastest, per request; the caller keeps it, and saves it as JSON if it is to last."""

    def __init__(self, names: dict[str, str] | None = None):
        self.names = dict(names or {})

    def to_json(self) -> str:
        return json.dumps(self.names, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Choices":
        """Raises ValueError when the text is not an object of strings."""
        names = json.loads(text)
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ValueError(f"measured choices: expected a JSON object of strings, got {text[:80]!r}")
        return cls(names)


class Registry:
    """The backends of one op, in order of preference."""

    def __init__(self, op: str):
        self.op = op
        self.backends: dict[str, Backend] = {}

    def register(
        self,
        name: str,
        function: Callable,
        refusal: Callable[[Request], str | None],
        error: float = 0.0,
        preferred: bool = False,
        fallback: bool = False,
    ):
        """Add a backend, the last in order of preference or, `preferred`, the first.

        refusal(request): None, or why it cannot run; error, fallback: as `Backend` has them. Raises ValueError on a
        used name.
        """
        if name == "auto" or name in self.backends:
            raise ValueError(
                f"{self.op}: the backend name {name!r} is taken; taken are auto, {', '.join(self.backends)}"
            )
        backend = {name: Backend(name, function, refusal, error, fallback)}
        self.backends = backend | self.backends if preferred else self.backends | backend

    def refusals(self, request: Request) -> dict[str, str | None]:
        """For each backend None, or why it cannot run this request."""
        return {name: backend.refusal(request) for name, backend in self.backends.items()}

    def choose(
        self,
        name: str,
        request: Request,
        *,
        allowed_error: float = 0.0,
        measure: Callable[[Backend], float] | None = None,
        choices: Choices | None = None,
    ) -> Backend:
        """The backend of that name, or with "auto" the best that can run the request.

        "auto" looks at backends whose stated error is at most `allowed_error`. It takes the first, or with `measure`
        (Backend -> seconds, infinity where it fails) the fastest, which `choices` remembers until the set of candidates
        changes; fallbacks come after all others, and are measured where these fail. A backend that is named is taken
        whatever its error. Raises ValueError, with each backend's reason, when none can run.
        """
        if name != "auto":
            backend = self.backends.get(name)
            if backend is None or backend.refusal(request) is not None:
                raise ValueError(self._complaint(name, request, allowed_error))
            return backend
        fitting = {}
        for backend in sorted(self.backends.values(), key=lambda backend: backend.fallback):
            if backend.error <= allowed_error and backend.refusal(request) is None:
                if measure is None:  # a forward chooses hundreds of times: the others need not be asked
                    return backend
                fitting[backend.name] = backend
        if not fitting:
            raise ValueError(self._complaint(name, request, allowed_error))
        if len(fitting) == 1:
            return next(iter(fitting.values()))
        choices = Choices() if choices is None else choices
        first, last = ([each for each in fitting.values() if each.fallback == kind] for kind in (False, True))
        candidates = "; else ".join(", ".join(each.name for each in some) for some in (first, last) if some)
        key = f"{self.op}: {request.key}; of {candidates}"
        if choices.names.get(key) not in fitting:
            choices.names[key] = _fastest(first, measure) or _fastest(last, measure) or next(iter(fitting))
        return fitting[choices.names[key]]

    def _complaint(self, name: str, request: Request, allowed_error: float) -> str:
        lines = []
        for backend in self.backends.values():
            reason = backend.refusal(request)
            if reason is None and name == "auto":
                reason = (
                    f"its relative error of {backend.error} is above the {allowed_error} allowed; choose it by name"
                )
            lines.append(f"  {backend.name}: {reason or 'can run'}")
        known = "" if name == "auto" or name in self.backends else " is not a known backend"
        return f"{self.op}: backend {name!r}{known or ' cannot run this'}. The backends:\n" + "\n".join(lines)


def _fastest(backends: list[Backend], measure: Callable[[Backend], float]) -> str | None:
    """The name of that of least seconds; None if all of them fail."""
    seconds = {backend.name: measure(backend) for backend in backends}
    return min((name for name in seconds if seconds[name] < math.inf), key=seconds.get, default=None)


def lazily(module: str, function: str) -> Callable:
    """kernels.<module>.<function>, imported at the first call: Triton may be missing where it is never used."""

    @functools.cache
    def imported() -> Callable:
        return getattr(importlib.import_module(f".{module}", __package__), function)

    def call(*arguments, **options):
        return imported()(*arguments, **options)

    return call


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU; (0, 0) of another device."""
    if device.type != "cuda":
        return 0, 0
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def version(package: str) -> str:
    """The version of an installed package, "none" without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def installed(package: str) -> bool:
    """Whether a top-level package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


@functools.cache
def has_tensor_descriptors() -> bool:
    """Whether the installed Triton can have Hopper's copy engine bring tiles: from version 3.4 on."""
    return importlib.util.find_spec("triton.tools.tensor_descriptor") is not None


@functools.cache
def has_gluon() -> bool:
    """Whether the installed Triton has Gluon, where kernels place their warps, as we write it: from version 3.6 on.

    Triton itself knows, whatever the name of the package that it came in.
    """
    if not installed("triton"):
        return False
    found = re.findall(r"\d+", importlib.import_module("triton").__version__)
    return tuple(map(int, found[:2])) >= (3, 6)


def triton_refusal(request: Request) -> str | None:
    """Why our Triton kernels cannot run the request."""
    if request.device.type != "cuda":
        return f"needs an NVIDIA GPU, the tensors are on {request.device.type}"
    if torch.version.hip:
        return "needs an NVIDIA GPU, this torch is built for ROCm"
    if not installed("triton"):
        return "needs the package triton, which is not installed"
    if request.capability < OLDEST:
        return "needs a GPU of compute capability 7.0 or newer, this one has {}.{}".format(*request.capability)
    if request.quantise and request.capability < (8, 9):
        return "needs for FP8 a GPU of compute capability 8.9 or newer, this one has {}.{}".format(*request.capability)
    return None


def no_refusal(request: Request) -> None:
    """The refusal of a plain-torch reference: it runs anything, anywhere."""
