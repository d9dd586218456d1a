"""What every execution backend offers, and how one is chosen. An engine runs graphs and knows no diffusion.

To add a backend: write a module beside this one with a class that is an `Engine` and an `open_engine`, and
name it in `_BACKENDS` and `_EXECUTED_BY`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engines.bundle import BUILD_COMMAND, Bundle
from engines.errors import BackendError, BundleError
from engines.spec import GRAPHS

Array = NDArray[Any]
DeviceTensor = Any
"""A tensor where the engine keeps it: opaque outside the engine that made it."""

DEVICES = ("auto", "cpu", "cuda")

INFERENCE_PRECISIONS = ("fp32", "bf16")

_BACKENDS = {
    "onnxruntime": "engines.backends.onnxruntime.engine",
    "openvino": "engines.backends.openvino.engine",
    "tensorrt": "engines.backends.tensorrt.engine",
    "tensorrt_rtx": "engines.backends.tensorrt.engine",
}
"""Backend -> module with an `open_engine` like the one below."""

BACKENDS = ("auto", *_BACKENDS)

_EXECUTED_BY = {
    "onnxruntime": ("openvino", "onnxruntime"),
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt_rtx",),
}
"""Backend named in a manifest -> backends that execute its graphs, the fastest on a CPU first. The name for
ONNX graphs is onnxruntime."""


class Engine(Protocol):
    """Runs the graphs of one bundle on one device.

    Outputs stay on the device and may be given to the next call as they are.
    """

    device: str
    """cpu or cuda."""
    backend: str
    """One of `BACKENDS`."""
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
            graph: one of `engines.spec.GRAPHS`.
            inputs: input name -> host array, or tensor that this engine returned.
            outputs: names of the outputs to compute; all if None.
        """

    def run_steps(
        self,
        graph: str,
        inputs: Mapping[str, DeviceTensor | Array],
        per_step: Mapping[str, Array],
        feedback: Mapping[str, str],
        outputs: Sequence[str] | None = None,
    ) -> dict[str, DeviceTensor]:
        """Runs a graph S times, each time with what the time before left.

        Args:
            graph: one of `engines.spec.GRAPHS`.
            inputs: as for `run`: what stays the same, and what the first step starts with.
            per_step: input name -> (S, ...) host array with the values of every step.
            feedback: input name -> the output whose values it has from the second step on.
            outputs: names of the outputs of the last step to return; all if None.

        Raises:
            ValueError: `per_step` is empty, or does not have one S.
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
    bundle: Bundle,
    device: str = "auto",
    threads: int | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
    inference_precision: str = "fp32",
    cuda_graphs: bool = False,
) -> Engine:
    """The engine for a bundle.

    Args:
        bundle: an opened bundle; its manifest says what kind of graphs it holds.
        device: cpu, cuda, or auto for the best that this machine has.
        threads: CPU threads of one operator; as many as there are cores if None.
        memory_budget: bytes of the device's memory to use at the most; nearly all that is free if None.
        backend: one of `BACKENDS`; auto for the fastest that is installed and runs the bundle.
        inference_precision: one of `INFERENCE_PRECISIONS`, of graphs that are in float32. With bf16, matrix
            products and convolutions have operands of 8 significant bits.
        cuda_graphs: whether ONNX Runtime captures the denoise graph as a CUDA graph; TensorRT always does.

    Raises:
        BackendError: the backend is not installed, has no such device, or needs more memory.
        BundleError: the bundle was built for a backend that this version does not know.
    """
    if device not in DEVICES:
        raise BackendError(f"there is no device '{device}': choose one of {', '.join(DEVICES)}")
    if inference_precision not in INFERENCE_PRECISIONS:
        raise BackendError(
            f"there is no inference precision '{inference_precision}': choose one of "
            f"{', '.join(INFERENCE_PRECISIONS)}"
        )
    backend = choose_backend(bundle, device, backend, inference_precision, memory_budget)
    if inference_precision != "fp32" and backend != "openvino":
        raise BackendError(f"only the backend openvino has the inference precision {inference_precision}")
    module = importlib.import_module(_BACKENDS[backend])
    options: dict[str, Any] = {}
    if backend == "openvino":
        options["inference_precision"] = inference_precision
    if backend == "onnxruntime":
        options["cuda_graphs"] = cuda_graphs
    engine: Engine = module.open_engine(bundle, device, threads, memory_budget, **options)
    return engine


def choose_backend(
    bundle: Bundle,
    device: str = "auto",
    backend: str = "auto",
    inference_precision: str = "fp32",
    memory_budget: int | None = None,
) -> str:
    """The backend that executes a bundle: the one that is asked for, or the fastest that is there and fits.

    Raises:
        BackendError: the one that is asked for does not execute this bundle.
        BundleError: this version has none for it.
    """
    kinds = {bundle.manifest.graphs[graph].backend for graph in GRAPHS}
    if len(kinds) != 1 or not kinds <= _EXECUTED_BY.keys():
        raise BundleError(
            f"the bundle at '{bundle.path}' is for {', '.join(sorted(kinds))}; this version of "
            f"anydoor-runtime runs bundles for {', '.join(_EXECUTED_BY)}"
        )
    candidates = _EXECUTED_BY[kinds.pop()]
    if backend not in BACKENDS:
        raise BackendError(f"there is no backend '{backend}': choose one of {', '.join(BACKENDS)}")
    if backend != "auto":
        if backend not in candidates:
            raise BackendError(
                f"the bundle at '{bundle.path}' runs with the backend {' or '.join(candidates)}, not with "
                f"{backend}: build one for it with '{BUILD_COMMAND} --backend {backend}'"
            )
        return backend
    if len(candidates) == 1:
        return candidates[0]
    if inference_precision == "fp32" and _has_card(device):
        return "onnxruntime"
    installed = [name for name in candidates if find_spec(name)]
    if (
        len(installed) == len(candidates)
        and inference_precision == "fp32"
        and not _fits(bundle, memory_budget)
    ):
        return "onnxruntime"
    return installed[0] if installed else candidates[-1]


def _fits(bundle: Bundle, memory_budget: int | None) -> bool:
    """Whether OpenVINO, which needs more memory to load a graph, has enough of it."""
    from engines.backends.openvino import engine as openvino

    try:
        return openvino.plan_residency(bundle, memory_budget).fits
    except BackendError:
        return False


def _has_card(device: str) -> bool:
    """Whether ONNX graphs are to run on a card, which only ONNX Runtime can."""
    if device == "cpu":
        return False
    if device == "cuda":
        return True
    # importing the library to ask it takes longer than looking for the file
    found = find_spec("onnxruntime")
    folders = (found.submodule_search_locations or []) if found else []
    return any(True for folder in folders for _ in Path(folder).glob("capi/*onnxruntime_providers_cuda.*"))


def run_step_by_step(
    engine: Engine,
    graph: str,
    inputs: Mapping[str, DeviceTensor | Array],
    per_step: Mapping[str, Array],
    feedback: Mapping[str, str],
    outputs: Sequence[str] | None = None,
) -> dict[str, DeviceTensor]:
    """`Engine.run_steps` as one call of `Engine.run` after the other."""
    given = dict(inputs)
    wanted = None if outputs is None else list(dict.fromkeys([*outputs, *feedback.values()]))
    results: dict[str, DeviceTensor] = {}
    for step in range(step_count(per_step)):
        given |= {name: values[step] for name, values in per_step.items()}
        results = engine.run(graph, given, wanted)
        given |= {name: results[output] for name, output in feedback.items()}
    return {name: results[name] for name in outputs or results}


def step_count(per_step: Mapping[str, Array]) -> int:
    """S of the `per_step` of `Engine.run_steps`."""
    counts = {len(values) for values in per_step.values()}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"inputs must have values for one number of steps, not for {sorted(counts)}")
    return counts.pop()


def concatenate_rows(pieces: Sequence[tuple[Array, int, int]]) -> Array:
    """`Engine.concatenate` for tensors in the host's memory."""
    return np.concatenate([tensor[start:stop] for tensor, start, stop in pieces])


def require_shape(name: str, array: Array, dtype: str) -> Array:
    """The array as the graph wants it: of the dtype, contiguous."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"input '{name}' must be a NumPy array or a tensor of this engine")
    return np.ascontiguousarray(array, dtype=dtype)
