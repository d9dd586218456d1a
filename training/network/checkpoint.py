"""Checkpoints of AnyDoor and IMPRINT in AnyDoor's layout: the one place that reads, checks and writes them.

Reading costs nothing until a tensor is used: files are memory-mapped, and no code in them is run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from engines.files import replacing
from training.network import checkpoint_file
from training.network.architecture import (
    PREDICTED,
    RESOLUTION,
    Architecture,
    ArchitectureError,
    DiffusionArchitecture,
    infer_architecture,
    settings_from_metadata,
    settings_to_metadata,
)
from training.network.checkpoint_file import CheckpointError, TensorFile, describe_differences
from training.network.checkpoint_keys import NetworkFile, read_network, unneeded_keys
from training.network.imprint import (
    OBJECT_STITCH,
    OBJECT_STITCH_DEFAULTS,
    UNCONDITIONAL,
    Imprint,
    ImprintArchitecture,
    from_object_stitch,
    infer_imprint,
    is_imprint,
    is_object_stitch,
)
from training.network.modules import AnyDoor, ReferenceNetwork
from training.network.official_keys import PREFIXES, SCHEDULE_KEYS, schedule_buffers

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "network_of",
    "read_checkpoint",
    "read_start",
    "write_checkpoint",
    "write_model",
]

DEFAULTS_KEY = "anydoor.defaults"
"""Metadata of a checkpoint: the parameters that its model is best used with, a JSON object."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of AnyDoor or IMPRINT that is complete; its tensors are read when they are used."""

    path: Path
    architecture: Architecture
    tensors: Mapping[str, Tensor]
    """Official key -> tensor, as stored."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What a request should use where it gives no value, as the checkpoint's metadata says: parameter (like
    guidance_scale, crop_ratio or mode) -> value."""
    resolution: int | None = None
    """Side of the pictures that it was trained on, in pixels, if its metadata says so."""
    remarks: str = ""
    """What is left out of them, for `describe`."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.tensors["model.diffusion_model.input_blocks.0.0.weight"].dtype

    @property
    def system(self) -> str:
        """Name of the system that it is a model of."""
        return "imprint" if isinstance(self.architecture, ImprintArchitecture) else "anydoor"

    @property
    def unconditional_tokens(self) -> Tensor:
        """The tokens (1, T, D) that stand for no reference, where they are weights: those of IMPRINT."""
        return self.tensors[UNCONDITIONAL].expand(-1, self.architecture.token_count, -1)

    @property
    def alphas_cumprod(self) -> Tensor | None:
        """The noise schedule (1000,) that the checkpoint was trained with, if it says so.

        A checkpoint that was rounded to half precision says it too roughly: then None stands for the usual
        schedule, if it is that one.
        """
        stored = self.tensors.get("alphas_cumprod")
        if stored is None or stored.dtype.itemsize >= torch.float32.itemsize:
            return stored
        usual = schedule_buffers()["alphas_cumprod"].to(stored.dtype)
        return None if torch.equal(stored, usual) else stored

    def describe(self) -> str:
        """Says what it is, in one sentence for the person who builds from it."""
        a = self.architecture
        with torch.device("meta"):
            weights = sum(map(math.prod, network_of(a).official_shapes().values()))
        name, encoder, adapter = "AnyDoor", "DINOv2", ""
        if isinstance(a, ImprintArchitecture):
            name, adapter = "IMPRINT", f", content adapter of {a.adapter_layers}"
            encoder = {"dinov2": encoder, "clip": "CLIP"}[a.id_backbone]
        return (
            f"{name}, {weights / 1e6:.0f} million weights, {str(self.dtype).removeprefix('torch.')}: "
            f"UNet predicts {PREDICTED[a.prediction]}; ID encoder {encoder} of {a.dino_depth} layers, "
            f"{a.dino_width} wide{adapter}{self.remarks}"
        )

    def load_part(
        self, part: str, dtype: torch.dtype | None = None, check_finite: bool = True
    ) -> ReferenceNetwork:
        """Builds a network with one part and loads its weights, sharing memory with the file if it can.

        Args:
            part: unet, vae, id_encoder, or control of AnyDoor.
            dtype: dtype of the weights; as stored if None.
            check_finite: read all weights once to see that each is a number.

        Raises:
            CheckpointError: a weight is not a finite number.
        """
        with torch.device("meta"):
            model = network_of(self.architecture, [part])
            keys = model.official_shapes()
        weights = {key: self.tensors[key] for key in keys}
        if check_finite:
            checkpoint_file.check_finite(self.path, weights)
        model.load_official_state_dict(weights, assign=True)
        return (model if dtype is None else model.to(dtype)).eval()


def network_of(architecture: Architecture, parts: Iterable[str] | None = None) -> ReferenceNetwork:
    """Builds the network of an architecture, or some of its parts."""
    chosen = {} if parts is None else {"parts": parts}
    if isinstance(architecture, ImprintArchitecture):
        return Imprint(architecture, **chosen)
    return AnyDoor(architecture, **chosen)


# --- reading ----------------------------------------------------------------------------------------------


def read_checkpoint(
    path: str | Path,
    unet_head_width: int | None = None,
    dino_heads: int | None = None,
    ema: bool = False,
) -> Checkpoint:
    """Opens a checkpoint and checks that it is complete.

    What the shapes do not determine comes from the arguments, else from the file's metadata, else from a
    configuration of the original's kind beside it (`NAME_config.json` for `NAME.safetensors`), else it is
    as in SD 2.1 and DINOv2. Keys that no part needs are left out.

    Args:
        path: see `checkpoint_file.read_tensors`.
        unet_head_width: channels per attention head of UNet and ControlNet.
        dino_heads: attention heads of the ID encoder.
        ema: take the averages of weights, of those that have one.

    Raises:
        CheckpointError: the file cannot be read, or is no checkpoint of AnyDoor, IMPRINT or ObjectStitch.
    """
    given = {"unet_head_width": unet_head_width, "dino_heads": dino_heads}
    known = {name: value for name, value in given.items() if value is not None}
    return _read(Path(path), read_network(Path(path), ema=ema), known, {})


def read_start(path: str | Path, architecture: Architecture) -> Checkpoint:
    """Opens a checkpoint that training goes on from.

    Args:
        path: see `read_checkpoint`.
        architecture: what the recipe says. Where the file does not say what the shapes do not determine, it
            is taken to be so.

    Raises:
        CheckpointError: see `read_checkpoint`, or it is of another architecture.
    """
    expected = {name: getattr(architecture, name) for name in architecture.not_inferable}
    checkpoint = _read(Path(path), read_network(Path(path)), {}, expected)
    if type(checkpoint.architecture) is not type(architecture):
        raise CheckpointError(f"'{path}' is of the system {checkpoint.system}, the recipe is of another one")
    for name in (each.name for each in fields(architecture)):
        there, here = getattr(checkpoint.architecture, name), getattr(architecture, name)
        if there != here:
            raise CheckpointError(
                f"'{path}' is a network with {name} = {there!r}, the recipe's has {here!r}: "
                "change [architecture] or start from another checkpoint"
            )
    return checkpoint


def _read(
    path: Path, network: NetworkFile, given: Mapping[str, Any], otherwise: Mapping[str, Any]
) -> Checkpoint:
    """Opens a checkpoint; settings are taken from `given`, then from the file, then from `otherwise`."""
    file = network.file
    scene = is_imprint(file.shapes)
    name = "IMPRINT" if scene else "AnyDoor"
    architecture: Architecture
    try:
        if scene:
            file, architecture = _as_imprint(file, given, otherwise)
        else:
            settings = settings_from_metadata(file.metadata) or _configuration_beside(file.paths[0], path)
            known = {name: otherwise[name] for name in otherwise if name in Architecture.not_inferable}
            architecture = infer_architecture(file.shapes, **{**known, **settings, **given})
        resolution = settings_from_metadata(file.metadata, [RESOLUTION]).get(RESOLUTION)
        with torch.device("meta"):
            expected = network_of(architecture).official_shapes()
    except (ArchitectureError, KeyError, ValueError) as error:
        problem = (not scene and _compare_prefixes(file.shapes)) or str(error)
        raise CheckpointError(f"'{path}' is not an {name} checkpoint: {problem}") from error
    unneeded = unneeded_keys(file.shapes, {*expected, *SCHEDULE_KEYS})
    file = file.renamed({key: key for key in file.shapes if key not in unneeded})
    problem = compare_shapes(file.shapes, expected)
    if problem:
        raise CheckpointError(f"'{path}' is not an {name} checkpoint: {problem}")
    defaults, remarks = _defaults(path, file.metadata), network.remarks(unneeded)
    if is_object_stitch(network.file.shapes):
        defaults = {**OBJECT_STITCH_DEFAULTS, **defaults}
    return Checkpoint(path, architecture, file.tensors, defaults, resolution, remarks)


def _as_imprint(
    file: TensorFile, given: Mapping[str, Any], otherwise: Mapping[str, Any]
) -> tuple[TensorFile, ImprintArchitecture]:
    """Returns the file in our layout, whichever it has, and its sizes."""
    settings = settings_from_metadata(file.metadata, ImprintArchitecture.not_inferable)
    if is_object_stitch(file.shapes):
        file, settings = from_object_stitch(file), {**OBJECT_STITCH, **settings}
    return file, infer_imprint(file.shapes, {**otherwise, **settings, **given})


def _configuration_beside(*paths: Path) -> dict[str, Any]:
    """Head widths from a configuration of the original's kind; empty if there is none.

    Args:
        paths: of the checkpoint: its first file, and what was given, which may be an index or a folder.
    """
    places = (path.with_name(f"{path.name.split('.')[0]}_config.json") for path in paths)
    stems = (path.with_name(f"{path.stem}_config.json") for path in paths)
    beside = next((place for place in (*stems, *places) if place.is_file()), None)
    if beside is None:
        return {}
    try:
        config = json.loads(beside.read_text("utf-8"))
        unet = config["model"]["params"]["unet_config"]["params"]
        return {
            "unet_head_width": int(unet["num_head_channels"]),
            "dino_heads": int(config["dino"]["num_heads"]),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"'{beside}' does not say the head widths: expected model.params.unet_config.params."
            "num_head_channels and dino.num_heads"
        ) from error


def _defaults(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    text = metadata.get(DEFAULTS_KEY, "{}")
    try:
        defaults = json.loads(text)
    except ValueError:
        defaults = None
    if not isinstance(defaults, dict):
        raise CheckpointError(f"'{path}': its metadata {DEFAULTS_KEY} is not a JSON object but {text!r}")
    return defaults


# --- writing ----------------------------------------------------------------------------------------------


def write_checkpoint(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    architecture: DiffusionArchitecture,
    defaults: Mapping[str, Any] | None = None,
    resolution: int | None = None,
) -> None:
    """Writes a .safetensors checkpoint as a whole or not at all.

    Args:
        path: of the file.
        tensors: official key -> tensor; dtypes and values are kept bit for bit.
        architecture: what its shapes do not determine is kept as metadata.
        defaults: see `Checkpoint.defaults`; kept as metadata.
        resolution: see `Checkpoint.resolution`; kept as metadata.
    """
    metadata = {"format": "pt"} | settings_to_metadata(architecture, resolution)
    if defaults:
        metadata[DEFAULTS_KEY] = json.dumps(dict(defaults))
    write_tensors(path, tensors, metadata)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a .safetensors file as a whole or not at all."""
    with replacing(path) as partial:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, dict(metadata))


def write_model(
    path: str | Path,
    model: ReferenceNetwork,
    dtype: torch.dtype = torch.float32,
    defaults: Mapping[str, Any] | None = None,
    resolution: int | None = None,
) -> None:
    """Writes a network as an official checkpoint, complete, because the original refuses one that is not.

    Args:
        path: of the file.
        model: with all of its parts.
        dtype: what its weights are rounded to. The noise schedule stays float32: in half precision its
            first steps would be the same.
        defaults: see `Checkpoint.defaults`.
        resolution: see `Checkpoint.resolution`.
    """
    weights = {key: tensor.to(dtype) for key, tensor in model.official_state_dict().items()}
    write_checkpoint(path, schedule_buffers() | weights, model.architecture, defaults, resolution)


# --- what is wrong with a file ----------------------------------------------------------------------------


def compare_shapes(shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    """Says in one sentence what is missing, unexpected or mis-shaped; empty if nothing is."""
    problems = describe_differences(shapes, expected, SCHEDULE_KEYS)
    if not problems:
        return ""
    # the guesses are of files that are taken for AnyDoor's
    kind = _looks_like(shapes) if any(key.startswith(PREFIXES["control"]) for key in expected) else ""
    return problems + (f". {kind}" if kind else "")


def _compare_prefixes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Returns the missing keys if so many are missing that the size of the network is unknown."""
    missing = [prefix for prefix in PREFIXES.values() if not any(key.startswith(prefix) for key in shapes)]
    if not missing:
        return ""
    first = next(iter(shapes), "none")
    sentence = f"it has no {', '.join(prefix + '*' for prefix in missing)} (its first key is '{first}')"
    kind = _looks_like(shapes)
    return sentence + (f". {kind}" if kind else "")


def _looks_like(keys: Mapping[str, tuple[int, ...]]) -> str:
    """Returns a guess at what the file is, and what to do with it; empty if there is no guess."""

    def has(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in keys)

    if has("model.diffusion_model.") and not has("control_model."):
        return (
            "It looks like plain Stable Diffusion: this has no control_model; start training from it "
            f"with '{_INITIALISE}'"
        )
    if (has("control_model.") and has("cond_stage_model.transformer")) or has(
        "cond_stage_model.model.transformer"
    ):
        return "It looks like a ControlNet for Stable Diffusion with a text encoder, not AnyDoor"
    if has("patch_embed.") and has("blocks."):
        return f"It looks like a DINOv2 encoder alone; start training from it with '{_INITIALISE}'"
    if has("down_blocks.") or has("unet.down_blocks."):
        return "It looks like diffusers' layout of a UNet; convert it to the original layout first"
    if any(key.endswith(".scale_weight") for key in keys):
        return "Its weights are in eight bits and scaled: get them as float16 or bfloat16"
    if has("model_ema.") or has("optimizer"):
        return "It looks like a training state; export its model weights alone"
    return ""


_INITIALISE = (
    "python export/initialise.py --stable-diffusion SD21.ckpt --dinov2 DINOV2.pth --output INIT.safetensors"
)
