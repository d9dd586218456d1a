"""Defines the interface of an engine, which runs graphs, and chooses a backend for a bundle."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from engines.bundle import Bundle
from engines.errors import BackendError, BundleError
from engines.manifest import ANY_TARGET, BUILD_COMMAND, CUDA, ONNX
from engines.options import AUTO, EngineOptions
from engines.registry import Backend, backends

Array = NDArray[Any]
DeviceTensor = Any
"""A tensor where the engine keeps it: opaque outside the engine that made it."""

Observer = Callable[[Literal["load", "run"], str, Mapping[str, Any]], AbstractContextManager[object]]
"""Called with what an engine is about to do, the graph, and the inputs of a run; wraps it. For measurements
and
tests: it may time, count, wait or raise."""


class Engine(Protocol):
    """Runs the graphs of one bundle on one device.

    Outputs stay on the device and may be given to the next call as they are.
    """

    device: str
    """cpu or cuda."""
    backend: str
    """Name of the backend."""
    cache_bytes: int | None
    """Device memory for tensors that are kept for later; None if it is the host's memory."""
    observer: Observer | None
    """Wraps every load and every run, if set."""

    def describe(self) -> str:
        """Returns the memory plan as a table for people; empty if everything is loaded together."""

    def load(self, graph: str) -> None:
        """Makes a graph ready to run; `run` does it on first use."""

    def unload(self, graph: str) -> None:
        """Frees the memory of a graph."""

    def close(self) -> None:
        """Frees all memory; the engine and its tensors are of no use after that."""

    def run(
        self,
        graph: str,
        inputs: Mapping[str, DeviceTensor | Array],
        outputs: Sequence[str] | None = None,
    ) -> dict[str, DeviceTensor]:
        """Runs a graph.

        Args:
            graph: its name in the manifest.
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
            graph: its name in the manifest.
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
        """Returns rows of tensors, one after the other, as a new tensor on the device.

        Args:
            pieces: (tensor, first row, row after the last); dtypes and all dimensions but the first agree.
        """

    def nbytes(self, tensor: DeviceTensor) -> int:
        """Returns the memory that a tensor occupies."""


class BackendModule(Protocol):
    """The functions that the engine module of every backend has."""

    def open_engine(self, bundle: Bundle, options: EngineOptions, most_cache: int | None = None) -> Engine:
        """Returns the engine for a bundle; see `open_engine`.

        Raises:
            AnyDoorError: it cannot run here, and why.
        """

    def fits(self, bundle: Bundle, options: EngineOptions) -> bool:
        """Returns whether the device has the memory that this backend needs for a bundle."""

    def usable_devices(self) -> dict[str, str]:
        """Returns device -> what of it people should know, for each that the installed library can use.

        Raises:
            BackendError: the library is not installed, or does not work.
        """

    def needed_bytes(self, bundle: Bundle, options: EngineOptions) -> int:
        """Returns the memory that the device needs for a bundle, all graphs loaded, without what is kept for
        later.

        Raises:
            BackendError: there is no such device.
        """

    def examine(self, bundle: Bundle, options: EngineOptions) -> tuple[str, str]:
        """Returns the device that would run a bundle, and the memory plan as a table; loads nothing.

        Raises:
            AnyDoorError: it cannot run here, and why.
        """


def load_backend(name: str) -> BackendModule:
    """Returns the engine module of a backend."""
    module: Any = importlib.import_module(backends()[name].module)
    backend: BackendModule = module
    return backend


def open_engine(
    bundle: Bundle, options: EngineOptions = EngineOptions(), most_cache: int | None = None
) -> Engine:
    """Returns the engine for a bundle.

    Args:
        bundle: an opened bundle; its manifest says what kind of graphs it holds.
        options: where and how they run.
        most_cache: bytes that the caller will keep for later pictures at most; a card, whose memory is
            allocated at once, has no more room for them.

    Raises:
        BackendError: the backend is not installed, has no such device or precision, or needs more memory.
        BundleError: the bundle was built for a backend that this version does not have.
    """
    name = choose_backend(bundle, options)
    backend = backends()[name]
    if options.inference_precision not in backend.precisions:
        able = [
            other.name for other in backends().values() if options.inference_precision in other.precisions
        ]
        raise BackendError(
            f"only the backend {' or '.join(able)} has the inference precision {options.inference_precision}"
        )
    return load_backend(name).open_engine(bundle, options, most_cache)


def needed_bytes(bundle: Bundle, options: EngineOptions = EngineOptions()) -> int:
    """Returns the memory that the device needs for a bundle, all graphs loaded, without what is kept for
    later.

    Raises:
        AnyDoorError: as `open_engine`.
    """
    return load_backend(choose_backend(bundle, options)).needed_bytes(bundle, options)


def choose_backend(bundle: Bundle, options: EngineOptions = EngineOptions()) -> str:
    """Returns name of the backend that executes a bundle: the one in the options, or the fastest that fits.

    Raises:
        BackendError: the one in the options does not execute this bundle.
        BundleError: no backend does.
    """
    candidates = [backend for backend in backends().values() if backend.runs == bundle.manifest.backend]
    names = [backend.name for backend in candidates]
    if not candidates:
        kinds = dict.fromkeys(backend.runs for backend in backends().values())
        raise BundleError(
            f"the bundle at '{bundle.path}' is for {bundle.manifest.backend}; this version of "
            f"anydoor-runtime runs bundles for {', '.join(kinds)}"
        )
    if options.backend == AUTO:
        return _fastest(candidates, bundle, options).name
    if options.backend in names and "cuda" not in backends()[options.backend].devices:
        refuse_card_graphs(bundle)
    if options.backend not in names:
        raise BackendError(
            f"the bundle at '{bundle.path}' runs with the backend {' or '.join(names)}, not with "
            f"{options.backend}: build one for it with '{BUILD_COMMAND} --backend {options.backend}'"
        )
    return options.backend


def refuse_card_graphs(bundle: Bundle) -> None:
    """Refuses a bundle on the CPU whose graphs have operators that only cards have kernels for.

    Raises:
        BackendError: says how to build one for the CPU.
    """
    if bundle.manifest.target == CUDA:
        raise BackendError(
            f"the bundle at '{bundle.path}' is for NVIDIA cards (pip install '.[cuda]'): build one "
            f"for the CPU with '{BUILD_COMMAND} --backend {ONNX} --targets {ANY_TARGET}'"
        )


def running_refusal(library: str, graph: str, error: Exception) -> BackendError:
    """Returns the error for a graph that did not run on the CPU.

    Args:
        library: that ran it.
        graph: which one.
        error: what the library raised.
    """
    reason = (str(error) or type(error).__name__).strip().splitlines()[-1][:300]
    if any(words in str(error) for words in ("bad_alloc", "Failed to allocate", "out of memory")):
        return BackendError(
            f"there is not enough memory to run the graph '{graph}' ({reason}): ask for fewer pictures at "
            "once, or close other programs"
        )
    return BackendError(f"{library} could not run the graph '{graph}': {reason}")


def _fastest(candidates: Sequence[Backend], bundle: Bundle, options: EngineOptions) -> Backend:
    if len(candidates) == 1:
        return candidates[0]
    with_cards = [
        backend
        for backend in candidates
        if "cuda" in backend.devices and options.inference_precision in backend.precisions
    ]
    for backend in with_cards:
        if bundle.manifest.target == CUDA or _wants_card(backend, options.device):
            return backend
    installed = [backend for backend in candidates if backend.installed]
    usable = [backend for backend in installed if options.inference_precision in backend.precisions]
    for backend in usable[:-1]:
        if load_backend(backend.name).fits(bundle, options):
            return backend
    return (usable or installed or candidates)[-1]


def _wants_card(backend: Backend, device: str) -> bool:
    return device == "cuda" or (device == AUTO and backend.has_card_files)


def observed(
    engine: Engine,
    action: Literal["load", "run"],
    graph: str,
    inputs: Mapping[str, DeviceTensor | Array] | None = None,
) -> AbstractContextManager[object]:
    """Returns the observer's context for an action of an engine; an empty one without an observer."""
    return engine.observer(action, graph, inputs or {}) if engine.observer else nullcontext()


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
    """Returns the array as the graph wants it: of the dtype, contiguous."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"input '{name}' must be a NumPy array or a tensor of this engine")
    return np.ascontiguousarray(array, dtype=dtype)
