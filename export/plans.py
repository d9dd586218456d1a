"""Builds plans from an ONNX bundle, for TensorRT for RTX and for TensorRT. Needs no PyTorch."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.backends.tensorrt.library import Library
from engines.backends.tensorrt.plans import DTYPES, PlanTensor, check_signature
from engines.bundle import Bundle, file_record
from engines.cuda import Device
from engines.errors import AnyDoorError
from engines.files import write_bytes
from engines.manifest import CUDA, GraphRecord, Manifest
from engines.spec import GraphSpec, TensorSpec
from export.progress import Progress

if TYPE_CHECKING:
    import tensorrt

DEFAULT_TARGETS = ("sm86", "sm89", "sm120")
"""RTX 30, 40 and 50. Several targets in one plan take no more room than one."""

_GRAPH_NAME = r"[A-Za-z0-9_][\w.+-]{0,99}"
"""Names of graphs, which become names of files."""


@dataclass(frozen=True)
class BuiltPlan:
    """A plan that was just built."""

    content: Any
    """Its bytes, in TensorRT's memory."""
    scratch_bytes: int
    """Device memory for the intermediate results of the largest call."""


def build_plans(
    source: Bundle,
    output: Path,
    library: Library,
    progress: Progress,
    max_batch: int,
    targets: Sequence[str] = (),
    timing_cache: Path | None = None,
) -> Manifest:
    """Builds the plans of all graphs.

    Args:
        source: a bundle of ONNX graphs.
        output: directory to write to; gets everything but the manifest.
        library: what to build with.
        progress: gets one step per graph.
        max_batch: most samples in one call.
        targets: GPU architectures, like sm89; TensorRT for RTX only.
        timing_cache: where kernel timings are kept from one build to the next; TensorRT only.

    Returns:
        The manifest of the new bundle.

    Raises:
        AnyDoorError: a target or the source is unusable, or a graph cannot be built.
    """
    _check_names(source)
    if source.manifest.target == CUDA:
        raise AnyDoorError(
            f"'{source.path}' holds graphs in the operators of ONNX Runtime's CUDA provider, which "
            f"{library.variant.title} does not have: build it again with --backend onnxruntime --targets any"
        )
    manifest = replace(source.manifest, max_batch=max_batch)
    target = ",".join(check_targets(library, targets))
    records = {}
    for graph in manifest.graphs:
        progress.step(f"{graph}: building the plan")
        started = time.monotonic()
        source.verify(graph)
        plan = build_plan(library, manifest, graph, source.graph_file(graph), target, progress, timing_cache)
        name = f"{graph}.plan"
        (output / name).write_bytes(plan.content)
        records[graph] = GraphRecord(
            manifest.specs[graph],
            files=(file_record(output, name),),
            error=manifest.graphs[graph].error,
            build_seconds=round(time.monotonic() - started, 1),
            scratch_bytes={library.backend: plan.scratch_bytes},
        )
    for record in source.small_files():
        (output / record.path).write_bytes(source.read(record))
    return replace(
        manifest,
        backend=library.backend,
        backend_version=library.version,
        target=target,
        graphs=records,
    )


def _check_names(source: Bundle) -> None:
    """Refuses names of graphs that are no names of files: whoever made the bundle chose them.

    Raises:
        AnyDoorError: names the first.
    """
    for graph in source.manifest.graphs:
        if not re.fullmatch(_GRAPH_NAME, graph):
            raise AnyDoorError(
                f"'{source.path}' cannot be built from: its graph {graph[:60]!r} is not named by letters, "
                "digits, and . _ + - alone"
            )


def check_targets(library: Library, targets: Sequence[str]) -> Sequence[str]:
    """Returns the architectures to build for: those that were asked for, or else what makes sense.

    Raises:
        AnyDoorError: the library does not support one of them.
    """
    possible = library.variant.targets
    if not possible:
        if targets:
            raise AnyDoorError(
                f"{library.variant.title} builds for the card of this machine only: leave --targets out, "
                "or use --backend tensorrt_rtx"
            )
        return (Device().card().architecture,)
    unknown = [target for target in targets if target not in possible]
    if unknown:
        raise AnyDoorError(
            f"{library.variant.title} supports {', '.join(possible)}, not {', '.join(unknown)}: for other "
            "cards build with --backend onnxruntime --targets cuda, or with --backend tensorrt on a machine "
            "that has one"
        )
    return tuple(targets) or DEFAULT_TARGETS


def build_plan(
    library: Library,
    manifest: Manifest,
    graph: str,
    onnx_file: Path,
    target: str,
    progress: Progress,
    timing_cache: Path | None = None,
) -> BuiltPlan:
    """Builds the plan of one graph. Types are those of the ONNX graph, operator by operator.

    Raises:
        AnyDoorError: the library cannot read the graph, or cannot build it; says its reason.
    """
    trt, spec = library.module, manifest.specs[graph]
    library.clear_messages()
    builder: tensorrt.Builder = trt.Builder(library.logger)
    flags: type[tensorrt.NetworkDefinitionCreationFlag] = trt.NetworkDefinitionCreationFlag
    network = builder.create_network(1 << int(flags.STRONGLY_TYPED))
    parser: tensorrt.OnnxParser = trt.OnnxParser(network, library.logger)
    if not parser.parse_from_file(str(onnx_file)):
        reason = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise AnyDoorError(f"{library.variant.title} cannot read the graph '{graph}': {reason}")
    check_signature(network_signature(network), spec, manifest.largest_sizes)
    config = new_config(library, builder)
    config.add_optimization_profile(_profile(builder, spec, manifest))
    config.progress_monitor = _monitor(trt, progress.percent)
    if library.variant.targets:
        _set_targets(trt, config, target.split(","))
    timings = _load_timings(config, timing_cache) if library.variant.times_kernels else None
    content = builder.build_serialized_network(network, config)
    if content is None:
        raise AnyDoorError(f"{library.variant.title} cannot build the graph '{graph}': {library.reason()}")
    if timings is not None and timing_cache is not None:
        write_bytes(timing_cache, timings.serialize())
    return BuiltPlan(content, scratch_bytes(library.messages))


def new_config(library: Library, builder: tensorrt.Builder) -> tensorrt.IBuilderConfig:
    """Returns how plans are built, whatever their graph. Products of FP32 numbers are in FP32.

    The library sets the flag TF32 by itself (`BuilderFlag` in the documentation of TensorRT's Python API).
    """
    flags: type[tensorrt.BuilderFlag] = library.module.BuilderFlag
    config = builder.create_builder_config()
    config.clear_flag(flags.TF32)
    for flag in library.variant.builder_flags:
        config.set_flag(getattr(flags, flag))
    return config


def _set_targets(trt: Any, config: Any, targets: Sequence[str]) -> None:
    """Says what to build for, which only TensorRT for RTX can be told."""
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)


def network_signature(network: tensorrt.INetworkDefinition) -> list[PlanTensor]:
    """Returns inputs and outputs of a network, before it is built; their names are those of its file."""
    inputs = [(network.get_input(i), True) for i in range(network.num_inputs)]
    outputs = [(network.get_output(i), False) for i in range(network.num_outputs)]
    return [
        PlanTensor(TensorSpec(t.name, DTYPES.get(t.dtype.name, t.dtype.name), tuple(t.shape)), is_input)
        for t, is_input in inputs + outputs
    ]


def scratch_bytes(messages: Sequence[tuple[str, str]]) -> int:
    """Returns size of the scratch memory, which only the builder's log tells without a card; 0 if it does
    not.

    Older versions leave out the unit (log in github.com/NVIDIA/TensorRT-LLM/issues/1397).
    """
    sizes = [re.fullmatch(r"Total Activation Memory: (\d+)(?: bytes)?", text) for _, text in messages]
    return max((int(match[1]) for match in sizes if match), default=0)


def _profile(builder: tensorrt.Builder, spec: GraphSpec, manifest: Manifest) -> tensorrt.IOptimizationProfile:
    """Returns the sizes that a plan is built for: one of everything, one picture with guidance, the largest
    call."""
    profile = builder.create_optimization_profile()
    smallest = dict.fromkeys(manifest.dimensions, 1)
    for tensor in spec.inputs:
        shapes = (
            tensor.resolve(sizes) for sizes in (smallest, manifest.typical_sizes, manifest.largest_sizes)
        )
        profile.set_shape(tensor.stored_name, *shapes)
    return profile


def _load_timings(config: tensorrt.IBuilderConfig, path: Path | None) -> tensorrt.ITimingCache | None:
    known = path.read_bytes() if path is not None and path.is_file() else b""
    # one that is damaged, or of another version or card, is refused; then start with an empty one
    for content in (known, b""):
        timings = config.create_timing_cache(content)
        if timings is not None and config.set_timing_cache(timings, ignore_mismatch=False):
            return timings
    return None


def _monitor(trt: Any, report: Callable[[float], None]) -> tensorrt.IProgressMonitor:
    """TensorRT's own progress, as one number."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Phases consist of steps, and a step of a phase may be a phase of its own."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases: dict[str, Phase] = {}
            self._done = 0.0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self._phases[name] = Phase(parent, steps)

        def phase_finish(self, name: str) -> None:
            phase = self._phases.pop(name, None)
            if phase is not None and phase.parent is None:
                report(1.0)

        def step_complete(self, name: str, step: int) -> bool:
            self._phases[name].done = step + 1
            # a phase may come twice; a bar that goes back tells nothing
            self._done = max(self._done, completed(self._phases, name))
            report(self._done)
            return True

    monitor: tensorrt.IProgressMonitor = Monitor()
    return monitor


@dataclass
class Phase:
    """A phase of a build."""

    parent: str | None
    steps: int
    done: int = 0


def completed(phases: Mapping[str, Phase], name: str | None) -> float:
    """Returns part of the whole that is done, 0..1, as far as a phase knows."""
    part = 0.0
    while name is not None and name in phases:
        phase = phases[name]
        part = min((phase.done + part) / max(phase.steps, 1), 1.0)
        name = phase.parent
    return part
