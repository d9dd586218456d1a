"""Reads and writes Stable Diffusion checkpoints: folders of diffusers, single files in the original layout.

The tensors of a checkpoint have the names of the modules of diffusers and transformers, whatever the layout.
Reading costs nothing until a tensor is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from engines.files import replacing
from runtime.systems.tokenizer import END
from training.network import diffusers_folder
from training.network.architecture import (
    PREDICTED,
    RESOLUTION,
    ArchitectureError,
    Shapes,
    settings_from_metadata,
)
from training.network.checkpoint import write_checkpoint
from training.network.checkpoint_file import (
    CheckpointError,
    LazyTensors,
    TensorFile,
    check_finite,
    describe_differences,
)
from training.network.checkpoint_keys import read_network, unneeded_keys
from training.network.official_keys import (
    PREFIXES,
    SCHEDULE_KEYS,
    expected_shapes,
    from_official,
    official_tensor,
    schedule_buffers,
    to_official,
)
from training.network.stable_diffusion import (
    BUILDERS,
    StableDiffusionArchitecture,
    find_text_encoder,
    infer_stable_diffusion,
)
from training.network.tokenizer_files import TokenizerFiles, read_tokenizer, write_tokenizer


@dataclass(frozen=True)
class StableDiffusionCheckpoint:
    """A complete Stable Diffusion checkpoint; its tensors are read when they are used."""

    path: Path
    architecture: StableDiffusionArchitecture
    parts: Mapping[str, Mapping[str, Tensor]]
    """unet, vae and text_encoder -> name in the state_dict of its module -> tensor, as stored."""
    tokenizer: TokenizerFiles | None = None
    """Single files have none."""
    size: tuple[int, int] | None = None
    """(height, width) of the pictures that it was trained on, in pixels, if it says so."""
    prediction_is_assumed: bool = False
    """Whether nothing says what the UNet predicts."""
    files: Sequence[Path] = ()
    """What it was read from, for a folder."""
    loras: Sequence[tuple[Path, float]] = ()
    """LoRA files that were merged into it, and their scales, in order."""
    remarks: str = ""
    """What is left out of a single file, for `describe`."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the UNet's weights."""
        return self.parts["unet"]["conv_in.weight"].dtype

    @property
    def pad(self) -> str:
        """The token that fills an encoded prompt: the tokenizer's, else as in 1.x or 2.x."""
        if self.tokenizer is not None:
            return self.tokenizer.pad
        return END if self.architecture.text_encoder == "clip" else "!"

    def load_part(self, part: str, dtype: torch.dtype | None = None) -> nn.Module:
        """Builds one part and loads its weights, sharing memory with the file if it can.

        Args:
            part: unet, vae or text_encoder.
            dtype: of the weights; as stored if None.

        Raises:
            CheckpointError: a weight is not a finite number.
        """
        weights = dict(self.parts[part])
        check_finite(self.path, weights)
        with torch.device("meta"):
            module = BUILDERS[part](self.architecture)
        module.load_state_dict(weights, assign=True)
        # not the method of diffusers, which warns of modules that it does not have
        return (module if dtype is None else nn.Module.to(module, dtype)).eval()

    def describe(self) -> str:
        """Says what it is, in one sentence for the person who builds from it."""
        a = self.architecture
        assumed = " (assumed, because the file does not say)" if self.prediction_is_assumed else ""
        scene = f"{a.latent_channels + a.scene_channels} input channels" + (
            ", with mask and scene" if a.scene_channels else ""
        )
        with torch.device("meta"):
            modules = [build(a) for build in BUILDERS.values()]
        weights = sum(math.prod(p.shape) for module in modules for p in module.parameters())
        return (
            f"Stable Diffusion {a.version}, {weights / 1e6:.0f} million weights, "
            f"{str(self.dtype).removeprefix('torch.')}: UNet with {scene}, predicts "
            f"{PREDICTED[a.prediction]}{assumed}; text encoder {a.text_encoder} of {a.text_layers} layers, "
            f"{a.text_width} wide; "
            + ("with its tokenizer" if self.tokenizer else "without a tokenizer")
            + "".join(f"; merged: {path.name} x {scale:g}" for path, scale in self.loras)
            + self.remarks
        )


# --- reading ----------------------------------------------------------------------------------------------


def is_stable_diffusion(path: Path) -> bool:
    """Returns whether a path is a Stable Diffusion checkpoint, by the folders or keys that are there."""
    if (path / "unet").is_dir():
        return True
    shapes = read_network(path).file.shapes
    has_control = any(key.startswith(PREFIXES["control"]) for key in shapes)
    return find_text_encoder(shapes) is not None and not has_control


def read_stable_diffusion(
    path: str | Path, variant: str | None = None, prediction: str | None = None, ema: bool = False
) -> StableDiffusionCheckpoint:
    """Opens a checkpoint and checks that it is complete.

    Args:
        path: a folder in the layout of diffusers; or in the original one, see `checkpoint_file.read_tensors`.
        variant: of a folder's weights, like fp16; see `diffusers_folder.read_part`.
        prediction: what the UNet's output means, where the checkpoint does not say: the noise if None. In the
            original layout nothing tells Stable Diffusion 2.0 and 2.1 for 768 px, which predict v, from those
            for 512 px.
        ema: of a checkpoint in the original layout, take the averages of weights, of those that have one.

    Raises:
        CheckpointError: it cannot be read, or is not a Stable Diffusion checkpoint that is known here.
    """
    path = Path(path)
    if variant is not None and not path.is_dir():
        raise CheckpointError(f"'{path}' is a file: a variant, like {variant}, is of the weights in a folder")
    try:
        is_folder = (path / "unet").is_dir()
        checkpoint = _read_folder(path, variant) if is_folder else _read_file(path, prediction, ema)
    except ArchitectureError as error:
        raise CheckpointError(
            f"'{path}' is not a Stable Diffusion 1.x or 2.x checkpoint that can be used: {error}"
        ) from error
    stored = checkpoint.architecture.prediction
    if prediction not in (None, stored):
        raise CheckpointError(
            f"'{path}' says that it predicts {PREDICTED[stored]}, so it cannot be read as {prediction}"
        )
    return checkpoint


def _read_folder(folder: Path, variant: str | None) -> StableDiffusionCheckpoint:
    architecture = diffusers_folder.read_architecture(folder)
    files = {part: diffusers_folder.read_part(folder, part, variant) for part in BUILDERS}
    for part, file in files.items():
        _compare(file.shapes, module_shapes(part, architecture), where=f"in {part}/, ")
    tokenizer = read_tokenizer(folder / "tokenizer") if (folder / "tokenizer").is_dir() else None
    if tokenizer is not None:
        check_tokenizer(tokenizer, architecture, f"the tokenizer of '{folder}'")
    tensors = {part: file.tensors for part, file in files.items()}
    paths = [
        *(folder / name for name in diffusers_folder.CONFIGURATIONS),
        *sorted(path for path in (folder / "tokenizer").glob("*") if path.is_file()),
        *(path for file in files.values() for path in file.paths),
    ]
    size = diffusers_folder.read_size(folder, architecture.latent_factor)
    return StableDiffusionCheckpoint(folder, architecture, tensors, tokenizer, size, files=paths)


def check_tokenizer(tokenizer: TokenizerFiles, architecture: StableDiffusionArchitecture, name: str) -> None:
    """Refuses a tokenizer whose tokens are not those that the text encoder knows.

    Raises:
        CheckpointError: calls it by its name.
    """
    if len(tokenizer.vocabulary) != architecture.text_vocabulary:
        raise CheckpointError(
            f"{name} has {len(tokenizer.vocabulary)} tokens and the text encoder "
            f"{architecture.text_vocabulary}"
        )


def _read_file(path: Path, prediction: str | None, ema: bool) -> StableDiffusionCheckpoint:
    network = read_network(path, ema=ema)
    file = network.file
    settings = settings_from_metadata(file.metadata, StableDiffusionArchitecture.not_inferable)
    side = settings_from_metadata(file.metadata, [RESOLUTION]).get(RESOLUTION)
    assumed = "prediction" not in settings and prediction is None
    if prediction is not None:
        settings.setdefault("prediction", prediction)
    architecture = infer_stable_diffusion(file.shapes, settings)
    layouts = _layouts(architecture)
    names = {part: module_shapes(part, architecture) for part in layouts}
    expected = official_shapes(architecture)
    shapes = {key: shape for key, shape in file.shapes.items() if not _is_unused(key, architecture)}
    unneeded = unneeded_keys(shapes, expected)
    _compare({key: shape for key, shape in shapes.items() if key not in unneeded}, expected)
    parts = {
        part: LazyTensors(
            {
                name: partial(_read_official, file, layout, name, shape, architecture)
                for name, shape in names[part].items()
            }
        )
        for part, layout in layouts.items()
    }
    remarks = network.remarks(unneeded)
    size = None if side is None else (side, side)
    return StableDiffusionCheckpoint(
        path, architecture, parts, None, size, assumed, files=file.paths, remarks=remarks
    )


def official_shapes(architecture: StableDiffusionArchitecture) -> dict[str, tuple[int, ...]]:
    """Maps key of the original layout -> shape, for every weight."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part, layout in _layouts(architecture).items():
        shapes |= expected_shapes(layout, module_shapes(part, architecture), architecture)
    return shapes


def _layouts(architecture: StableDiffusionArchitecture) -> dict[str, str]:
    """Returns part -> what `official_keys` calls it."""
    return {"unet": "unet", "vae": "vae", "text_encoder": architecture.text_encoder}


def module_shapes(part: str, architecture: StableDiffusionArchitecture) -> dict[str, torch.Size]:
    """Maps name in the state_dict of a part's module -> shape."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in BUILDERS[part](architecture).state_dict().items()}


def _read_official(
    file: TensorFile, layout: str, name: str, shape: torch.Size, architecture: StableDiffusionArchitecture
) -> Tensor:
    return from_official(layout, {name: shape}, file.tensors, architecture)[name]


def _compare(shapes: Shapes, expected: Mapping[str, tuple[int, ...]], where: str = "") -> None:
    """Refuses what is not complete."""
    differences = describe_differences(shapes, {key: tuple(shape) for key, shape in expected.items()})
    if differences:
        raise ArchitectureError(where + differences)


def _is_unused(key: str, architecture: StableDiffusionArchitecture) -> bool:
    """Tensors in files of the original layout that no part needs: buffers, and OpenCLIP's end."""
    last = official_tensor("openclip", f"encoder.layers.{architecture.text_layers}.", architecture).key
    return (
        key in SCHEDULE_KEYS
        or key.startswith(last)
        or key.endswith(".position_ids")
        or key
        in {f"cond_stage_model.model.{name}" for name in ("logit_scale", "text_projection", "attn_mask")}
    )


# --- writing ----------------------------------------------------------------------------------------------


def write_single_file(path: str | Path, checkpoint: StableDiffusionCheckpoint) -> None:
    """Writes a .safetensors file in the original layout, as a whole or not at all, weights bit for bit."""
    tensors = schedule_buffers()
    for part, layout in _layouts(checkpoint.architecture).items():
        tensors |= to_official(layout, checkpoint.parts[part], checkpoint.architecture)
    height, width = checkpoint.size or (None, None)
    resolution = height if height == width else None
    write_checkpoint(path, tensors, checkpoint.architecture, resolution=resolution)


def write_folder(path: str | Path, checkpoint: StableDiffusionCheckpoint) -> None:
    """Writes a folder that `DiffusionPipeline.from_pretrained` opens, as a whole or not at all."""
    a = checkpoint.architecture
    with replacing(path) as folder:
        for part in BUILDERS:
            module: Any = checkpoint.load_part(part)
            if part == "unet" and checkpoint.size is not None:
                module.register_to_config(sample_size=_latent_size(checkpoint.size, a.latent_factor))
            module.save_pretrained(folder / part)
        diffusers_folder.write_scheduler(folder, a)
        if checkpoint.tokenizer is not None:
            write_tokenizer(folder / "tokenizer", checkpoint.tokenizer, a.text_positions)
        index = {
            "_class_name": f"StableDiffusion{'Inpaint' if a.scene_channels else ''}Pipeline",
            "_diffusers_version": diffusers.__version__,
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "tokenizer": ["transformers", "CLIPTokenizer"] if checkpoint.tokenizer else [None, None],
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
        }
        (folder / "model_index.json").write_text(json.dumps(index, indent=2), "utf-8")


def _latent_size(size: tuple[int, int], factor: int) -> int | list[int]:
    """Returns a size as diffusers notes it: of the latent, its side where it is square."""
    height, width = (side // factor for side in size)
    return height if height == width else [height, width]
