"""What every execution backend offers, and how one is chosen. An engine runs graphs and knows no diffusion.

To add a backend: write a module beside this one with a class that is an `Engine`, and name it in `_BACKENDS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engines.bundle import Bundle
from engines.errors import BackendError, BundleError
from engines.graphs import GRAPHS

Array = NDArray[Any]
DeviceTensor = Any
"""A tensor where the engine keeps it: opaque outside the engine that made it."""

DEVICES = ("auto", "cpu", "cuda")

_BACKENDS = {
    "onnxruntime": "engines.onnxruntime",
    "tensorrt": "engines.tensorrt",
    "tensorrt_rtx": "engines.tensorrt",
}
"""Backend named in a manifest -> module with an `open_engine` like the one below."""


class Engine(Protocol):
    """Runs the graphs of one bundle on one device.

    Outputs stay on the device and may be given to the next call as they are.
    """

    device: str
    """cpu or cuda."""
    cache_bytes: int | None
    """Device memory for tensors that are kept for later; None if it is the host's memory."""

    def describe(self) -> str:
        """What lives where, as a table for people; empty if there is nothing to tell."""

    def load(self, graph: str) -> None:
        """Makes a graph ready to run; `run` does it on first use."""

    def unload(self, graph: str) -> None:
        """Gives the memory of a graph back."""

    def run(
        self,
        graph: str,
        inputs: Mapping[str, DeviceTensor | Array],
        outputs: Sequence[str] | None = None,
    ) -> dict[str, DeviceTensor]:
        """Runs a graph.

        Args:
            graph: one of `engines.graphs.GRAPHS`.
            inputs: input name -> host array, or tensor that this engine returned.
            outputs: names of the outputs to compute; all if None.
        """

    def to_device(self, array: Array) -> DeviceTensor:
        """Copies a host array to the device."""

    def to_host(self, tensor: DeviceTensor) -> Array:
        """Copies a tensor to the host."""

    def concatenate(self, pieces: Sequence[tuple[DeviceTensor, int, int]]) -> DeviceTensor:
        """Rows of tensors, one after the other, as a new tensor on the device.

        Args:
            pieces: (tensor, first row, row after the last); dtypes and all dimensions but the first agree.
        """

    def nbytes(self, tensor: DeviceTensor) -> int:
        """The memory that a tensor occupies."""


def open_engine(
    bundle: Bundle, device: str = "auto", threads: int | None = None, memory_budget: int | None = None
) -> Engine:
    """The engine for a bundle.

    Args:
        bundle: an opened bundle; its manifest names the backend.
        device: cpu, cuda, or auto for the best that this machine has.
        threads: CPU threads of one operator; as many as there are cores if None.
        memory_budget: bytes of the card's memory to use at the most; nearly all that is free if None.

    Raises:
        BackendError: the backend is not installed, has no such device, or needs more memory.
        BundleError: the bundle was built for a backend that this version does not know.
    """
    backends = {bundle.manifest.graphs[graph].backend for graph in GRAPHS}
    if len(backends) != 1 or not backends <= _BACKENDS.keys():
        raise BundleError(
            f"the bundle at '{bundle.path}' is for {', '.join(sorted(backends))}; this version of "
            f"anydoor-runtime runs bundles for {', '.join(_BACKENDS)}"
        )
    if device not in DEVICES:
        raise BackendError(f"there is no device '{device}': choose one of {', '.join(DEVICES)}")
    module = importlib.import_module(_BACKENDS[backends.pop()])
    engine: Engine = module.open_engine(bundle, device, threads, memory_budget)
    return engine


def require_shape(name: str, array: Array, dtype: str) -> Array:
    """The array as the graph wants it: of the dtype, contiguous."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"input '{name}' must be a NumPy array or a tensor of this engine")
    return np.ascontiguousarray(array, dtype=dtype)
