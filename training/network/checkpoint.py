"""AnyDoor checkpoints in the official layout: reading, checking, writing.

Nothing is read before it is used: the files are memory-mapped, optimizer states are never touched, and no
code that a pickle carries is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engines.errors import AnyDoorError
from training.network.architecture import (
    Architecture,
    ArchitectureError,
    hidden_from_metadata,
    infer_architecture,
)
from training.network.modules import AnyDoor
from training.network.official_keys import PREFIXES, SCHEDULE_KEYS

_NAMED = 3
"""How many keys an error names before it says how many more there are."""


class CheckpointError(AnyDoorError):
    """The file is not an AnyDoor checkpoint that can be used, and why."""


@dataclass(frozen=True)
class Checkpoint:
    """An AnyDoor checkpoint that has been found complete; its tensors are read when they are used."""

    path: Path
    architecture: Architecture
    tensors: Mapping[str, Tensor]
    """Official key -> tensor, as stored."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.tensors["model.diffusion_model.input_blocks.0.0.weight"].dtype

    @property
    def alphas_cumprod(self) -> Tensor | None:
        """The noise schedule (1000,) that the checkpoint was trained with, if it says so."""
        return self.tensors.get("alphas_cumprod")

    def load_part(self, part: str, dtype: torch.dtype | None = None, check_finite: bool = True) -> AnyDoor:
        """A network with one part built and its weights loaded, sharing memory with the file if it can.

        Args:
            part: unet, control, vae or id_encoder.
            dtype: dtype of the weights; as stored if None.
            check_finite: read all weights once to see that each is a number.

        Raises:
            CheckpointError: a weight is not a finite number.
        """
        weights = {k: self.tensors[k] for k in self.tensors if k.startswith(PREFIXES[part])}
        broken = [key for key, tensor in weights.items() if check_finite and not _all_finite(tensor)]
        if broken:
            raise CheckpointError(
                f"'{self.path}' has weights that are not finite numbers (NaN or infinity): {_some(broken)}"
            )
        with torch.device("meta"):
            model = AnyDoor(self.architecture, parts=[part])
        model.load_official_state_dict(weights, assign=True)
        return (model if dtype is None else model.to(dtype)).eval()


def read_checkpoint(
    path: str | Path, unet_head_width: int | None = None, dino_heads: int | None = None
) -> Checkpoint:
    """Opens a checkpoint and checks that it is complete.

    What the shapes cannot tell comes from the arguments, else from the file's metadata, else from a
    configuration of the original's kind beside it (`NAME_config.json` for `NAME.safetensors`), else it is
    as in SD 2.1 and DINOv2.

    Args:
        path: .safetensors, or a .ckpt/.pt/.pth written by torch.save.
        unet_head_width: channels per attention head of UNet and ControlNet.
        dino_heads: attention heads of the ID encoder.

    Raises:
        CheckpointError: the file cannot be read, or is not an AnyDoor checkpoint.
    """
    path = Path(path)
    file = read_tensors(path)
    shapes = file.shapes
    given = {"unet_head_width": unet_head_width, "dino_heads": dino_heads}
    try:
        hidden = hidden_from_metadata(file.metadata) or _configuration_beside(path)
        hidden |= {name: value for name, value in given.items() if value is not None}
        architecture = infer_architecture(shapes, **hidden)
        with torch.device("meta"):
            expected = AnyDoor(architecture).official_shapes()
    except (ArchitectureError, KeyError, ValueError) as error:
        problem = _compare_prefixes(shapes) or str(error)
        raise CheckpointError(f"'{path}' is not an AnyDoor checkpoint: {problem}") from error
    problem = compare_shapes(shapes, expected)
    if problem:
        raise CheckpointError(f"'{path}' is not an AnyDoor checkpoint: {problem}")
    return Checkpoint(path, architecture, file.tensors)


# --- files ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorFile:
    """The named tensors of a file, whatever model they belong to."""

    tensors: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str] = field(default_factory=dict)


class _SafetensorsFile(Mapping[str, Tensor]):
    """The tensors of a .safetensors file, mapped into memory one by one as they are asked for."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt")
        self.metadata: dict[str, str] = self._file.metadata() or {}
        self.shapes = {key: tuple(self._file.get_slice(key).get_shape()) for key in self._file.keys()}  # noqa: SIM118

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.shapes:
            raise KeyError(key)
        return self._file.get_tensor(key)  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def read_tensors(path: Path) -> TensorFile:
    """Opens a file of tensors without reading them.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it holds no named tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at '{path}'")
    try:
        if path.suffix == ".safetensors":
            file = _SafetensorsFile(path)
            return TensorFile(file, file.shapes, file.metadata)
        content = _load_pickle(path)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise CheckpointError(
            f"'{path}' cannot be read as a checkpoint ({str(error).splitlines()[0]}): it is damaged or "
            "incomplete, or not a .safetensors or torch.save file"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"'{path}' holds no named tensors")
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        raise CheckpointError(f"'{path}' holds no named tensors")
    return TensorFile(tensors, {key: tuple(tensor.shape) for key, tensor in tensors.items()})


class _Inert:
    """Stands in for whatever class or function a pickle names, and does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _load_pickle(path: Path) -> Any:
    """Unpickles tensors and plain containers; what else the file names becomes an inert object.

    Lightning checkpoints name callbacks, paths and optimizers. None of that is imported or called.
    """
    import pickle
    import zipfile

    if not zipfile.is_zipfile(path):
        raise ValueError("it is not in the zip format that torch.save writes since PyTorch 1.6")
    inert: list[Any] = []
    for name in torch.serialization.get_unsafe_globals_in_checkpoint(str(path)):
        stand_in = type(name.rsplit(".", 1)[-1], (_Inert,), {})
        inert.append((stand_in, name))
    try:
        with torch.serialization.safe_globals(inert):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError("its pickle is damaged or does more than hold tensors") from error


def _configuration_beside(path: Path) -> dict[str, Any]:
    """Head widths from a configuration of the original's kind; empty if there is none."""
    beside = path.with_name(f"{path.stem}_config.json")
    if not beside.is_file():
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


# --- what is wrong with it --------------------------------------------------------------------------------


def _all_finite(tensor: Tensor) -> bool:
    # minimum and maximum are NaN or infinite if any value is; no mask as large as the tensor is made
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()) if tensor.numel() else True


_INITIALISE = (
    "python export/initialise.py --stable-diffusion SD21.ckpt --dinov2 DINOV2.pth --output INIT.safetensors"
)


def _some(keys: list[str]) -> str:
    named = ", ".join(f"'{key}'" for key in keys[:_NAMED])
    return named + (f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else "")


def compare_shapes(shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    """What is missing, unexpected or mis-shaped, in one sentence; empty if nothing is."""
    missing = [key for key in expected if key not in shapes]
    unexpected = [key for key in shapes if key not in expected and key not in SCHEDULE_KEYS]
    wrong = [key for key in expected if key in shapes and shapes[key] != expected[key]]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(expected)} keys are missing ({_some(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} keys are unexpected ({_some(unexpected)})")
    if wrong:
        first = wrong[0]
        problems.append(
            f"{len(wrong)} tensors have the wrong shape ({_some(wrong)}; "
            f"'{first}' is {shapes[first]} and should be {expected[first]})"
        )
    if not problems:
        return ""
    kind = _looks_like(shapes)
    return "; ".join(problems) + (f". {kind}" if kind else "")


def _compare_prefixes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What is missing when so much is that the size of the network is unknown."""
    missing = [prefix for prefix in PREFIXES.values() if not any(key.startswith(prefix) for key in shapes)]
    if not missing:
        return ""
    first = next(iter(shapes), "none")
    sentence = f"it has no {', '.join(prefix + '*' for prefix in missing)} (its first key is '{first}')"
    kind = _looks_like(shapes)
    return sentence + (f". {kind}" if kind else "")


def _looks_like(keys: Mapping[str, tuple[int, ...]]) -> str:
    """A guess at what the file is, and what to do with it; empty if there is none."""

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
    if has("model_ema.") or has("optimizer"):
        return "It looks like a training state; export its model weights alone"
    return ""
