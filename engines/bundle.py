"""The bundle: a directory with a manifest, the graphs and the constants of a checkpoint.

    manifest.json       what this is, what it was made from, and the hash of every other file
    constants.npz       unconditional ID tokens, noise schedule
    id_encoder.onnx     the graphs (`engines.spec`), with their weights beside them
    id_encoder.onnx.data
    ...

docs/model-format.md describes every field of the manifest.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import BundleError
from engines.spec import GRAPHS, GraphSpec, ModelShape, graph_specs
from engines.verified import FileState

FORMAT = "anydoor-bundle"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CONSTANTS = "constants.npz"
BUILD_COMMAND = "python export/build_engines.py CHECKPOINT"

Progress = Callable[[int], object]
"""Called with the number of bytes just read."""


@dataclass(frozen=True)
class FileRecord:
    """One file of the bundle."""

    path: str
    """Relative to the bundle."""
    bytes: int
    sha256: str


@dataclass(frozen=True)
class GraphRecord:
    """One graph of the bundle."""

    files: tuple[FileRecord, ...]
    """The first is the one to load; others hold its weights."""
    backend: str
    """onnxruntime, tensorrt or tensorrt_rtx."""
    backend_version: str
    target: str
    """What it was built for: "any", or the GPU architectures of a TensorRT plan."""
    error: Mapping[str, float]
    """Output -> relative error against PyTorch, measured when it was built."""
    build_seconds: float = 0.0
    scratch_bytes: int = 0
    """Device memory for the intermediate results of the largest call; only plans tell."""


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json."""

    checkpoint: Mapping[str, Any]
    """File name and sha256 of the checkpoint."""
    architecture: Mapping[str, Any]
    """Sizes of the network that was exported, for information."""
    model: ModelShape
    schedule: Mapping[str, Any]
    """Kind of noise schedule and prediction; the values are in constants.npz."""
    precision: str
    """fp32 or fp16: of weights and activations. Inputs and outputs are float32, but for the detail maps."""
    max_batch: int
    """Most samples in one call; twice as many rows and maps."""
    graphs: Mapping[str, GraphRecord]
    constants: FileRecord
    producer: str = ""
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    @property
    def specs(self) -> dict[str, GraphSpec]:
        """The signatures of the graphs."""
        return graph_specs(self.model)

    def to_json(self) -> str:
        """The text of manifest.json."""
        content = asdict(self)
        head = {key: content.pop(key) for key in ("format", "format_version", "producer")}
        signatures = {
            name: {
                side: [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in tensors]
                for side, tensors in (("inputs", spec.inputs), ("outputs", spec.outputs))
            }
            for name, spec in self.specs.items()
        }
        for name, graph in content["graphs"].items():
            graph.update(signatures[name])
        return json.dumps(head | content, indent=1) + "\n"


@dataclass
class Bundle:
    """An opened bundle. Opening reads the manifest only; `verify` compares the hashes of a graph's files."""

    path: Path
    manifest: Manifest
    _verified: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Opens a bundle and checks that every file is there with the size it should have.

        Raises:
            BundleError: there is no bundle, it is damaged, or a newer version made it.
        """
        path = Path(path)
        if not path.is_dir():
            raise BundleError(f"there is no bundle at '{path}': build one with '{BUILD_COMMAND}'")
        bundle = cls(path, read_manifest(path / MANIFEST))
        for record in bundle.files():
            bundle._check_size(record)
        return bundle

    def files(self) -> list[FileRecord]:
        """Every file but the manifest."""
        graphs = self.manifest.graphs.values()
        return [self.manifest.constants, *(record for graph in graphs for record in graph.files)]

    def graph_file(self, graph: str) -> Path:
        """The file to load for a graph."""
        return self.path / self.manifest.graphs[graph].files[0].path

    def verify(self, graph: str, progress: Progress | None = None, reread: bool = False) -> None:
        """Compares the hashes of a graph's files, once per opened bundle.

        A file that was found sound before and has not changed since is not read (`engines.verified`).

        Args:
            graph: which one.
            progress: told of every block that is read.
            reread: read all files, whatever was found before.

        Raises:
            BundleError: a file is not the one that was built.
        """
        if graph in self._verified and not reread:
            return
        for record in self.manifest.graphs[graph].files:
            self._verify_file(record, progress, reread)
        self._verified.add(graph)

    def constants(self) -> dict[str, NDArray[np.float32]]:
        """`unconditional_tokens` (1, T, D) and `alphas_cumprod` (1000,), float32.

        Raises:
            BundleError: the file is damaged.
        """
        self._check_hash(self.manifest.constants, None)
        try:
            with np.load(self.path / self.manifest.constants.path, allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise self._damaged(self.manifest.constants, "cannot be read") from error

    def _check_size(self, record: FileRecord) -> None:
        file = self.path / record.path
        if not file.is_file():
            raise self._damaged(record, "is missing")
        if file.stat().st_size != record.bytes:
            raise self._damaged(record, f"has {file.stat().st_size} bytes instead of {record.bytes}")

    def _verify_file(self, record: FileRecord, progress: Progress | None, reread: bool) -> None:
        try:
            state = FileState.of(self.path / record.path, record.sha256)
        except OSError as error:
            raise self._damaged(record, f"cannot be read ({error.strerror})") from error
        if reread or not state.is_verified():
            self._check_hash(record, progress)
            state.remember()

    def _check_hash(self, record: FileRecord, progress: Progress | None) -> None:
        try:
            found = sha256(self.path / record.path, progress)
        except OSError as error:
            raise self._damaged(record, f"cannot be read ({error.strerror})") from error
        if found != record.sha256:
            raise self._damaged(record, "is not the file that was built (its hash differs)")

    def _damaged(self, record: FileRecord, what: str) -> BundleError:
        return BundleError(
            f"the bundle at '{self.path}' is damaged: {record.path} {what}; "
            f"copy it again or rebuild it with '{BUILD_COMMAND}'"
        )


def sha256(path: Path, progress: Progress | None = None) -> str:
    """The hexadecimal hash of a file."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 22):
            digest.update(block)
            if progress:
                progress(len(block))
    return digest.hexdigest()


def file_record(bundle: Path, name: str) -> FileRecord:
    """The manifest's entry for a file that was just written."""
    return FileRecord(name, (bundle / name).stat().st_size, sha256(bundle / name))


def read_manifest(path: Path) -> Manifest:
    """Reads manifest.json.

    Raises:
        BundleError: it is missing, is not a manifest, or is of a newer version.
    """
    where = f"'{path.parent}'"
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{where} is not a bundle: it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"the bundle at {where} is damaged: {MANIFEST} is not readable JSON") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BundleError(f"{where} is not a bundle: its {MANIFEST} does not say format '{FORMAT}'")
    version = content.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise BundleError(
            f"the bundle at {where} has format version {version} and this runtime reads up to "
            f"{FORMAT_VERSION}: upgrade anydoor-runtime, or rebuild the bundle with '{BUILD_COMMAND}'"
        )
    try:
        return _parse(content)
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"the bundle at {where} is damaged: {MANIFEST} is incomplete ({error!r}); "
            f"rebuild it with '{BUILD_COMMAND}'"
        ) from error


def _parse(content: dict[str, Any]) -> Manifest:
    model = dict(content["model"])
    model["detail_shapes"] = tuple(tuple(s) for s in model["detail_shapes"])
    graphs = {}
    for name in GRAPHS:
        record = content["graphs"][name]
        graphs[name] = GraphRecord(
            files=tuple(_parse_file(f) for f in record["files"]),
            backend=str(record["backend"]),
            backend_version=str(record["backend_version"]),
            target=str(record["target"]),
            error=dict(record["error"]),
            build_seconds=float(record["build_seconds"]),
            scratch_bytes=int(record.get("scratch_bytes", 0)),
        )
    return Manifest(
        checkpoint=content["checkpoint"],
        architecture=content["architecture"],
        model=ModelShape(**model),
        schedule=content["schedule"],
        precision=content["precision"],
        max_batch=int(content["max_batch"]),
        graphs=graphs,
        constants=_parse_file(content["constants"]),
        producer=str(content["producer"]),
        format_version=content["format_version"],
    )


def _parse_file(record: dict[str, Any]) -> FileRecord:
    relative = Path(record["path"])
    if relative.is_absolute() or ".." in relative.parts:
        raise ValueError(f"path '{relative}' leaves the bundle")
    return FileRecord(str(record["path"]), int(record["bytes"]), str(record["sha256"]))
