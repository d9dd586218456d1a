"""Reads the manifest of a bundle. docs/model-format.md describes every field of the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engines import format_1, signature
from engines.errors import BundleError
from engines.schema import MANIFEST_2
from engines.spec import BankSpec, GraphSpec, Role, TensorSpec, sizes_for
from engines.strict_json import parse_json, read_limited

FORMAT = "anydoor-bundle"
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
BUILD_COMMAND = "anydoor build CHECKPOINT"

ONNX = "onnxruntime"
"""Kind of the graphs of a bundle that holds ONNX files."""

ANY_TARGET = "any"
CUDA = "cuda"
CPU = "cpu"
"""Targets of ONNX graphs: standard operators alone, or those of an execution provider of ONNX Runtime."""

LARGEST_MANIFEST = 16 << 20
_LARGEST_TENSOR = 1 << 40
"""Bytes."""


@dataclass(frozen=True)
class FileRecord:
    """One file of the bundle."""

    path: str
    """Relative to the bundle."""
    bytes: int
    sha256: str


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer of prompts."""

    merges: FileRecord
    """The byte pairs that are merged, in order: merges.txt."""
    pad: str
    """The token that fills an encoded prompt."""
    any_case: tuple[str, ...] = ()
    """Special tokens that are recognised in capitals, too."""


@dataclass(frozen=True)
class GraphRecord:
    """One graph of the bundle."""

    spec: GraphSpec
    files: tuple[FileRecord, ...]
    """The first is the one to load; others hold its weights."""
    error: Mapping[str, float] = field(default_factory=dict)
    """Output -> relative error against PyTorch, measured when it was built."""
    build_seconds: float = 0.0
    scratch_bytes: Mapping[str, int] = field(default_factory=dict)
    """Backend -> memory for intermediate results: of a typical call on a CPU, of the largest call for plans,
    and for ONNX graphs on a card, which are `cuda`."""
    variants: Mapping[str, FileRecord] = field(default_factory=dict)
    """Target -> the same graph in its operators, with the weights of `files`."""
    made_from: str = ""
    """SHA-256 of weights and settings that it was exported from; empty if it is not known."""

    @property
    def all_files(self) -> tuple[FileRecord, ...]:
        """Its files and those of its variants."""
        return (*self.files, *self.variants.values())

    @property
    def nbytes(self) -> int:
        """Bytes of its files, variants apart."""
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json."""

    system: str
    """Name of the compositing system, as in `runtime.systems`."""
    backend: str
    """Kind of the graphs: onnxruntime for ONNX files, or the TensorRT that built the plans."""
    backend_version: str
    target: str
    """Target of the build: any, cuda, or the GPU architectures of plans, like sm86,sm89."""
    precision: str
    """fp32 or fp16, of weights and activations."""
    max_batch: int
    """Most samples in one call."""
    dimensions: Mapping[str, int]
    """Variable dimension -> its size for one sample with guidance."""
    graphs: Mapping[str, GraphRecord]
    constants: FileRecord
    tokenizer: TokenizerRecord | None = None
    """None: the bundle takes no prompts."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Parameter -> the value that the model was trained for; what a request leaves open comes from here."""
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    """File name and sha256 of the checkpoint, and what was merged into it."""
    architecture: Mapping[str, Any] = field(default_factory=dict)
    """Sizes of the network that was exported, for information."""
    schedule: Mapping[str, Any] = field(default_factory=dict)
    """Kind of noise schedule and prediction; the values are in constants.npz."""
    producer: str = ""

    @property
    def specs(self) -> dict[str, GraphSpec]:
        """Graph -> its signature."""
        return {name: record.spec for name, record in self.graphs.items()}

    @property
    def largest_sizes(self) -> dict[str, int]:
        """Variable dimension -> its size in the largest call."""
        return sizes_for(self.dimensions, self.max_batch)

    @property
    def typical_sizes(self) -> dict[str, int]:
        """Variable dimension -> its size for one picture with guidance."""
        return sizes_for(self.dimensions, 1)

    def with_role(self, role: Role) -> list[GraphSpec]:
        """Returns the graphs with a role."""
        return [spec for spec in self.specs.values() if spec.role == role]

    @property
    def is_segmenter(self) -> bool:
        """Whether its graphs find objects. Such a bundle makes no pictures, and has no other graphs."""
        return bool(self.with_role("segment"))

    @property
    def step(self) -> GraphSpec:
        """The graph that takes a step."""
        return self.with_role("step")[0]

    @property
    def decoder(self) -> GraphSpec:
        """The graph that makes a picture of a latent."""
        return self.with_role("decode")[0]

    @property
    def encoder(self) -> GraphSpec | None:
        """The graph that makes a latent of a picture, if there is one."""
        return next(iter(self.with_role("scene")), None)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a latent."""
        channels, height, width = self.step.tensor("latent").resolve(self.typical_sizes)[1:]
        return channels, height, width

    @property
    def picture_size(self) -> tuple[int, int]:
        """(height, width) of the generated picture, in pixels; of a segmenter, of what it takes."""
        if self.is_segmenter:
            height, width = self.with_role("segment")[0].tensor("picture").resolve(self.typical_sizes)[2:]
            return height, width
        height, width = self.decoder.tensor("image").resolve(self.typical_sizes)[1:3]
        return height, width

    @property
    def resolution(self) -> int:
        """Side of the generated picture, in pixels, of a bundle whose pictures are square."""
        return self.picture_size[0]

    @property
    def size_text(self) -> str:
        """The size of the generated picture, for people: 512 px, or 768x512 px, width first."""
        height, width = self.picture_size
        return f"{width} px" if width == height else f"{width}x{height} px"

    def to_json(self) -> str:
        """Returns the text of manifest.json."""
        content = asdict(self)
        for name, record in self.graphs.items():
            content["graphs"][name] = _spec_to_json(record.spec) | {
                key: value for key, value in content["graphs"][name].items() if key != "spec"
            }
        if self.tokenizer is None:
            del content["tokenizer"]
        head = {"format": FORMAT, "format_version": FORMAT_VERSION, "producer": content.pop("producer")}
        return json.dumps(head | content, indent=1) + "\n"


def read_manifest(path: Path, trusted_key: Path | None = None) -> Manifest:
    """Reads manifest.json, of this format version or an older one.

    Args:
        path: of the file.
        trusted_key: PEM file; the manifest must be signed by its owner. None: no signature is needed.

    Raises:
        BundleError: it is missing, is not a manifest, is of a newer version, or is not signed by the key.
        BackendError: cryptography is not installed.
    """
    where = f"'{path.parent}'"
    try:
        text = read_limited(path, LARGEST_MANIFEST)
        if trusted_key is not None:
            signature.check(text, path.with_name(signature.SIGNATURE), trusted_key)
        content = parse_json(text)
    except FileNotFoundError:
        raise BundleError(f"{where} is not a bundle: it has no {MANIFEST}") from None
    except OSError as error:
        raise BundleError(f"the bundle at {where} cannot be read: {MANIFEST}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"the bundle at {where} is damaged: {MANIFEST} is not valid JSON ({error})"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BundleError(f"{where} is not a bundle: its {MANIFEST} does not say format '{FORMAT}'")
    version = content.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise BundleError(
            f"the bundle at {where} has format version {version} and this runtime reads up to "
            f"{FORMAT_VERSION}: upgrade anydoor-runtime, or rebuild the bundle with '{BUILD_COMMAND}'"
        )
    try:
        content = format_1.upgrade(content) if version == 1 else content
        MANIFEST_2("", content)
        manifest = parse_manifest(content)
        _check(manifest)
    except (ValueError, BundleError) as error:
        raise BundleError(
            f"the bundle at {where} is damaged: {MANIFEST} cannot be used ({error}); "
            f"rebuild it with '{BUILD_COMMAND}'"
        ) from error
    return manifest


def parse_manifest(content: Mapping[str, Any]) -> Manifest:
    """Makes a manifest of content that `engines.schema.MANIFEST_2` takes.

    Whether its parts fit together is not checked.
    """
    return Manifest(
        system=str(content["system"]),
        backend=str(content["backend"]),
        backend_version=str(content["backend_version"]),
        target=str(content["target"]),
        precision=str(content["precision"]),
        max_batch=int(content["max_batch"]),
        dimensions={name: int(size) for name, size in content["dimensions"].items()},
        graphs={name: _parse_graph(name, record) for name, record in content["graphs"].items()},
        constants=_parse_file(content["constants"]),
        tokenizer=_parse_tokenizer(content["tokenizer"]) if "tokenizer" in content else None,
        defaults=dict(content["defaults"]),
        checkpoint=dict(content["checkpoint"]),
        architecture=dict(content["architecture"]),
        schedule=dict(content["schedule"]),
        producer=str(content["producer"]),
    )


def _check(manifest: Manifest) -> None:
    """Refuses a manifest whose parts do not fit together.

    Raises:
        ValueError, BundleError: says which part.
    """
    roles = [spec.role for spec in manifest.specs.values()]
    if "segment" in roles:
        if other := sorted({*roles} - {"segment"}):
            raise ValueError(f"graphs cannot have both roles 'segment' and '{other[0]}'")
        if len(manifest.with_role("segment")[0].tensor("picture").shape) != 4:
            raise ValueError("the picture does not have four dimensions")
    for role in () if manifest.is_segmenter else ("step", "decode"):
        if roles.count(role) != 1:
            raise ValueError(f"one graph must have the role '{role}', not {roles.count(role)}")
    for spec in manifest.specs.values():
        named = {size for tensor in spec.tensors for size in tensor.shape if isinstance(size, str)}
        if unknown := sorted(named - manifest.dimensions.keys()):
            raise ValueError(f"'{spec.name}' has the unknown dimension '{unknown[0]}'")
        for tensor in spec.tensors:
            if tensor.nbytes(manifest.largest_sizes) > _LARGEST_TENSOR:
                raise ValueError(f"'{tensor.name}' of '{spec.name}' would take more than 1 TiB")
    if not manifest.is_segmenter:
        _check_sampling(manifest)
    for graph, record in manifest.graphs.items():
        loaded = (record.files[0], *record.variants.values())
        if manifest.backend == ONNX and not all(file.path.endswith(".onnx") for file in loaded):
            raise ValueError(f"a file of '{graph}' is not named *.onnx")


_SAMPLERS_OWN = ("latent", "carry", "start_noise")
"""Inputs of a step graph that every sampler gives."""


def _check_sampling(manifest: Manifest) -> None:
    """Checks the graphs that make pictures."""
    step = manifest.step
    banks = [name for bank in step.banks for name in (*bank.tensors, bank.index)]
    for name in (*banks, *step.per_step, *step.feedback, *step.feedback.values()):
        step.tensor(name)
    latent, image = step.tensor("latent"), manifest.decoder.tensor("image")
    if len(latent.shape) != 4 or len(image.shape) != 4:
        raise ValueError("the latent or the picture does not have four dimensions")
    if image.shape[3] != 3 or image.dtype != "uint8":
        raise ValueError("the picture does not have three channels of 8 bits")
    for name in ("next_latent", "epsilon"):
        if step.tensor(name).shape != latent.shape:
            raise ValueError(f"'{name}' does not have the shape of the latent")
    given = {*_SAMPLERS_OWN, *banks, *step.per_step}
    if unknown := [tensor.name for tensor in step.inputs if tensor.name not in given]:
        raise ValueError(f"nothing gives the input '{unknown[0]}' of '{step.name}'")


def _parse_graph(name: str, content: Mapping[str, Any]) -> GraphRecord:
    spec = GraphSpec(
        name=name,
        role=content["role"],
        inputs=tuple(_parse_tensor(tensor) for tensor in content["inputs"]),
        outputs=tuple(_parse_tensor(tensor) for tensor in content["outputs"]),
        banks=tuple(
            BankSpec(str(bank["name"]), tuple(bank["tensors"]), str(bank["index"]))
            for bank in content["banks"]
        ),
        per_step=tuple(content["per_step"]),
        feedback=dict(content["feedback"]),
    )
    return GraphRecord(
        spec=spec,
        files=tuple(_parse_file(record) for record in content["files"]),
        error={output: float(error) for output, error in content["error"].items()},
        build_seconds=float(content["build_seconds"]),
        scratch_bytes={backend: int(size) for backend, size in content["scratch_bytes"].items()},
        variants={target: _parse_file(record) for target, record in content.get("variants", {}).items()},
        made_from=str(content.get("made_from", "")),
    )


def _parse_tensor(content: Mapping[str, Any]) -> TensorSpec:
    shape = tuple(size if isinstance(size, str) else int(size) for size in content["shape"])
    return TensorSpec(str(content["name"]), str(content["dtype"]), shape, str(content.get("file_name", "")))


def _parse_file(record: Mapping[str, Any]) -> FileRecord:
    return FileRecord(str(record["path"]), int(record["bytes"]), str(record["sha256"]))


def _parse_tokenizer(content: Mapping[str, Any]) -> TokenizerRecord:
    any_case = tuple(str(token) for token in content["any_case"])
    return TokenizerRecord(_parse_file(content["merges"]), str(content["pad"]), any_case)


def _spec_to_json(spec: GraphSpec) -> dict[str, Any]:
    def tensor(of: TensorSpec) -> dict[str, Any]:
        content: dict[str, Any] = {"name": of.name, "dtype": of.dtype, "shape": list(of.shape)}
        return content | ({"file_name": of.file_name} if of.file_name else {})

    return {
        "role": spec.role,
        "inputs": [tensor(of) for of in spec.inputs],
        "outputs": [tensor(of) for of in spec.outputs],
        "banks": [asdict(bank) for bank in spec.banks],
        "per_step": list(spec.per_step),
        "feedback": dict(spec.feedback),
    }
