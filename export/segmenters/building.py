"""Builds a bundle's graphs from the ONNX files of a segmentation network, and compares each with the
network."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from engines.backends.onnxruntime.engine import load_library
from engines.bundle import CONSTANTS, Bundle, file_record, sha256
from engines.engine import open_engine
from engines.errors import AnyDoorError
from engines.manifest import ANY_TARGET, FileRecord, GraphRecord, Manifest
from engines.options import EngineOptions
from engines.spec import GraphSpec, TensorSpec
from export.options import ONNX
from export.output import printable
from export.progress import Progress
from export.scratch import scratch_of_graph
from export.segmenters.recognition import (
    CLICK,
    EMBED,
    POINTS,
    SALIENT,
    Wrap,
    check_mask,
    read_network,
    recognise,
)
from export.segmenters.wrapping import graph_outputs, network_inputs, network_outputs, wrap_network

SYSTEM = "segmenter"

MOST_POINTS = 33
"""Clicks, corners of a box and what fills up, of one call: what plans are built for."""

TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2}
"""Precision of a network -> largest relative error of any output that a build accepts. In FP16, rounding
depends on which operators ONNX Runtime fuses: an IS-Net differs by 4e-4 from itself with its wrap."""

_ON_THE_CPU = EngineOptions(backend=ONNX, device="cpu")


@dataclass(frozen=True)
class SegmenterSource:
    """Recognised networks."""

    paths: tuple[Path, ...]
    models: tuple[onnx.ModelProto, ...]
    wraps: tuple[Wrap, ...]
    """In the order in which the graphs run."""

    @classmethod
    def open(cls, paths: Sequence[Path], normalise: str | None = None) -> SegmenterSource:
        """Reads ONNX files: one network that finds the main object, or an encoder and a decoder.

        Args:
            paths: of the files; an encoder and its decoder in any order.
            normalise: of `NORMALISATIONS`, where the network does not say it.

        Raises:
            AnyDoorError: a file cannot be read, or is of no known network.
        """
        models = [read_network(path) for path in paths]
        found = list(zip(recognise(paths, models, normalise), models, paths, strict=True))
        found.sort(key=lambda each: each[0].graph == CLICK)
        wraps, ordered, places = zip(*found, strict=True)
        return cls(places, ordered, wraps)

    @property
    def description(self) -> str:
        """What was recognised, in one sentence."""
        return self.wraps[0].description

    @property
    def precision(self) -> str:
        """Precision of the weights: fp16 if any are, else fp32."""
        weights = (weight for model in self.models for weight in model.graph.initializer)
        half = any(weight.data_type == onnx.TensorProto.FLOAT16 for weight in weights)
        return "fp16" if half else "fp32"

    def record(self) -> dict[str, Any]:
        """Returns names and hash of the files, for the manifest; of two, the hash of what sha256sum
        prints."""
        names = printable(", ".join(path.name for path in self.paths))
        if len(self.paths) == 1:
            return {"file": names, "sha256": sha256(self.paths[0])}
        lines = "".join(f"{sha256(path)}  {path.name}\n" for path in self.paths)
        return {"file": names, "sha256": hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()}


def export_segmenter(source: SegmenterSource, output: Path, progress: Progress) -> Manifest:
    """Writes the graphs of a segmenter, and compares each with its network.

    Args:
        source: recognised networks.
        output: directory to write to; gets everything but the manifest.
        progress: gets two steps per graph.

    Raises:
        AnyDoorError: a network cannot be run, or its graph does not compute what it does.
    """
    manifest = Manifest(
        system=SYSTEM,
        backend=ONNX,
        backend_version=version("onnxruntime"),
        target=ANY_TARGET,
        precision=source.precision,
        max_batch=1,
        dimensions={POINTS: MOST_POINTS} if len(source.wraps) > 1 else {},
        graphs={},
        constants=FileRecord(CONSTANTS, 0, ""),
        checkpoint=source.record(),
        architecture={"wrap": source.description},
        producer=f"anydoor-runtime {version('anydoor-runtime')}",
    )
    np.savez(output / CONSTANTS)
    arrays: dict[str, NDArray[Any]] = {}
    for wrap, model, path in zip(source.wraps, source.models, source.paths):
        started = time.monotonic()
        progress.step(f"{wrap.graph}: running the network")
        arrays |= _example_inputs(wrap)
        results = _run(path, model, wrap, arrays)
        spec = _spec(wrap, arrays, results)
        arrays |= results
        progress.step(f"{wrap.graph}: comparing its graph with it")
        wrap_network(wrap, model, output / f"{wrap.graph}.onnx", spec)
        record = _record(spec, output / f"{wrap.graph}.onnx", manifest)
        error = _compare(output, replace(manifest, graphs={wrap.graph: record}), spec, arrays)
        record = replace(record, error=error, build_seconds=round(time.monotonic() - started, 1))
        manifest = replace(manifest, graphs={**manifest.graphs, wrap.graph: record})
    return replace(manifest, constants=file_record(output, CONSTANTS))


def _example_inputs(wrap: Wrap) -> dict[str, NDArray[Any]]:
    """Returns a seeded picture, which is not dark anywhere, or two clicks on it."""
    if wrap.graph == CLICK:
        points = np.array([[[0.3, 0.4], [0.6, 0.5]]], np.float32) * wrap.size
        return {"points": points, "labels": np.array([[1, 0]], np.float32)}
    picture = np.random.default_rng(0).random((1, 3, wrap.size, wrap.size), np.float32)
    inside = np.ones((1, 1, wrap.size, wrap.size), np.float32)
    inside[:, :, wrap.size * 3 // 4 :] = 0
    return {"picture": picture, "inside": inside}


def _run(
    path: Path, model: onnx.ModelProto, wrap: Wrap, arrays: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[np.float32]]:
    """Returns what the graph of a network must give: the network runs alone, and NumPy does the rest."""
    onnxruntime = load_library()
    given = {name: arrays[name] for name in arrays if name != "inside" or len(wrap.inputs) > 1}
    names = network_outputs(wrap, model)
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        outputs = session.run(names, network_inputs(wrap, model, given))
    except Exception as error:  # the library raises classes of its own, all derived from Exception
        raise AnyDoorError(f"ONNX Runtime cannot run '{path}': {str(error).splitlines()[0]}") from error
    _check_outputs(path, wrap, dict(zip(names, outputs)))
    titles = {
        SALIENT: ["mask"],
        EMBED: [f"features_{index}" for index in range(len(names))],
        CLICK: ["masks", "scores"],
    }
    return dict(zip(titles[wrap.graph], graph_outputs(wrap, model, outputs), strict=True))


def _check_outputs(path: Path, wrap: Wrap, outputs: Mapping[str, Any]) -> None:
    """Refuses what no network of the kind gives; its file need not say what it gives.

    Raises:
        AnyDoorError: names the output.
    """
    for name, array in outputs.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
            raise AnyDoorError(f"'{path}' gives '{name}', which is no array of numbers")
    if wrap.graph == SALIENT:
        ((name, mask),) = outputs.items()
        if mask.ndim < 2:
            raise AnyDoorError(f"'{path}' gives '{name}' {mask.shape}, which is no mask")
        check_mask(path, name, mask.shape, wrap.size)
    if wrap.graph == CLICK:
        shapes = [array.shape for array in outputs.values()]
        masks, scores = shapes[0], shapes[-1]
        if len(masks) < 3 or math.prod(masks[:-3]) != 1 or math.prod(scores) != masks[-3]:
            given = " and ".join(f"'{name}' {array.shape}" for name, array in outputs.items())
            raise AnyDoorError(
                f"the decoder '{path}' gives {given}: known ones give masks (1, K, s, s) and scores (1, K)"
            )


def _spec(
    wrap: Wrap, arrays: Mapping[str, NDArray[Any]], results: Mapping[str, NDArray[np.float32]]
) -> GraphSpec:
    taken = [name for name in arrays if name.startswith("features_")] if wrap.graph == CLICK else []
    features = [TensorSpec(name, "float32", arrays[name].shape) for name in taken]
    outputs = tuple(TensorSpec(name, "float32", array.shape) for name, array in results.items())
    return GraphSpec(wrap.graph, "segment", (*features, *wrap.inputs), outputs)


def _record(spec: GraphSpec, path: Path, manifest: Manifest) -> GraphRecord:
    files = (path, path.with_name(f"{path.name}.data"))
    records = tuple(file_record(path.parent, file.name) for file in files if file.exists())
    return GraphRecord(spec, records, scratch_bytes=scratch_of_graph(path, manifest))


def _compare(
    output: Path, manifest: Manifest, spec: GraphSpec, arrays: Mapping[str, NDArray[Any]]
) -> dict[str, float]:
    """Returns output -> relative error of a built graph.

    Raises:
        AnyDoorError: it is too large.
    """
    engine = open_engine(Bundle(output, manifest), _ON_THE_CPU)
    found = engine.run(spec.name, {tensor.name: arrays[tensor.name] for tensor in spec.inputs})
    tolerance = TOLERANCE[manifest.precision]
    errors = {}
    for name, tensor in found.items():
        difference = np.linalg.norm(engine.to_host(tensor) - arrays[name])
        errors[name] = float(difference / max(float(np.linalg.norm(arrays[name])), 1e-30))
        if not errors[name] <= tolerance:  # nor if it is no number
            raise AnyDoorError(
                f"the graph '{spec.name}' differs from its network: '{name}' has a relative error of "
                f"{errors[name]:.1e}, and {tolerance:.0e} is accepted in {manifest.precision}"
            )
    return errors
