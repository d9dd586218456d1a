"""Merges LoRA files into a checkpoint: W + scale * alpha / rank * B A.

Known are the keys of diffusers, of its versions before PEFT, of PEFT's adapters and of kohya's scripts:

    unet.down_blocks.0.attentions.0. ... .attn1.to_q.lora_A.weight                diffusers
    unet.down_blocks.0.attentions.0. ... .attn1.processor.to_q_lora.down.weight   diffusers before PEFT
    base_model.model.down_blocks.0.attentions.0. ... .attn1.to_q.lora_A.weight    PEFT
    lora_unet_down_blocks_0_attentions_0_ ... _attn1_to_q.lora_down.weight        kohya

Sources: Hu et al., 2021 (LoRA), section 4.1; diffusers, `loaders` and `utils/state_dict_utils.py`; PEFT,
`tuners/lora`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from training.network.checkpoint_file import (
    CheckpointError,
    LazyTensors,
    TensorFile,
    read_tensors,
    reader,
    some_keys,
)
from training.network.stable_diffusion_checkpoint import StableDiffusionCheckpoint

_KEY = re.compile(
    r"(?P<module>.+?)(?:"
    r"(?:\.lora_A(?:\.default)?|\.lora_down|[._]lora\.down|\.lora_linear_layer\.down)(?P<down>\.weight)|"
    r"(?:\.lora_B(?:\.default)?|\.lora_up|[._]lora\.up|\.lora_linear_layer\.up)(?P<up>\.weight)|"
    r"\.(?P<alpha>alpha))"
)

_PREFIXES = {
    "unet.": ("unet",),
    "text_encoder.": ("text_encoder",),
    "lora_unet_": ("unet",),
    "lora_te_": ("text_encoder",),
    "base_model.model.": ("unet", "text_encoder"),
    "": ("unet",),
}
"""How keys begin -> the parts that they may be of."""

_UNSUPPORTED = ("use_rslora", "use_dora", "alpha_pattern")
"""Settings of PEFT that change what the matrices mean."""


@dataclass
class _Update:
    """What a file says of one weight."""

    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None
    keys: list[str] = field(default_factory=list)


def merge_lora(
    checkpoint: StableDiffusionCheckpoint, path: str | Path, scale: float = 1.0
) -> StableDiffusionCheckpoint:
    """Gives a checkpoint with the updates of a LoRA file; the sums are formed when they are read.

    Args:
        checkpoint: what it was made for; its dtypes stay.
        path: .safetensors, .bin or .ckpt file. PEFT's adapters have an adapter_config.json beside it.
        scale: how much of the updates is added.

    Raises:
        CheckpointError: the file cannot be read, has keys that are unknown or incomplete, or was made for
            another model.
    """
    path = Path(path)
    file = read_tensors(path)
    updates = _collect(checkpoint, path, file)
    alphas = _alphas(path, file)
    parts = dict(checkpoint.parts)
    for part, tensors in checkpoint.parts.items():
        readers = {name: reader(tensors, name) for name in tensors}
        for name, update in updates.items():
            if name[0] == part:
                down, up = _matrices(path, update, tensors[name[1]])
                # kohya's scripts write 0 for an alpha that is the rank
                alpha = update.alpha or alphas.get(part) or down.shape[0]
                factor = scale * alpha / down.shape[0]
                readers[name[1]] = partial(_merged, readers[name[1]], down, up, factor)
        parts[part] = LazyTensors(readers)
    return replace(checkpoint, parts=parts, loras=(*checkpoint.loras, (path, scale)))


def _collect(
    checkpoint: StableDiffusionCheckpoint, path: Path, file: TensorFile
) -> dict[tuple[str, str], _Update]:
    """Maps (Part, name of the weight) to its update."""
    weights = {
        part: {
            name.removesuffix(".weight").replace(".", "_"): name
            for name in tensors
            if name.endswith(".weight")
        }
        for part, tensors in checkpoint.parts.items()
    }
    updates: dict[tuple[str, str], _Update] = {}
    unknown = []
    for key in file.shapes:
        match = _KEY.fullmatch(key)
        place = _find(match["module"], weights) if match else None
        if match is None or place is None:
            unknown.append(key)
            continue
        update = updates.setdefault(place, _Update())
        update.keys.append(key)
        if match["alpha"]:
            update.alpha = float(file.tensors[key])
        elif match["down"]:
            update.down = file.tensors[key]
        else:
            update.up = file.tensors[key]
    if unknown:
        raise CheckpointError(
            f"'{path}' is not a LoRA for this checkpoint: {len(unknown)} of its {len(file.shapes)} keys are "
            f"unknown ({some_keys(unknown)})"
        )
    return updates


def _find(module: str, weights: Mapping[str, Mapping[str, str]]) -> tuple[str, str] | None:
    """Returns the part, and the name of the weight there, that a LoRA's module is for."""
    for prefix, parts in _PREFIXES.items():
        if not module.startswith(prefix):
            continue
        name = module.removeprefix(prefix).replace(".processor.", ".").replace(".", "_")
        for part in parts:
            if part == "text_encoder":
                name = name.removeprefix("text_model_")
                name = re.sub(r"self_attn_to_([qkv])$", r"self_attn_\1_proj", name)
                name = re.sub(r"self_attn_to_out$", "self_attn_out_proj", name)
            else:
                name = re.sub(r"_to_out$", "_to_out_0", name)
            if name in weights[part]:
                return part, weights[part][name]
    return None


def _alphas(path: Path, file: TensorFile) -> dict[str, float]:
    """Returns part -> alpha, where a configuration says it: in the metadata, or beside an adapter of PEFT."""
    beside = path.with_name("adapter_config.json")
    is_adapter = any(key.startswith("base_model.model.") for key in file.shapes)
    try:
        if is_adapter:
            config: dict[str, Any] = json.loads(beside.read_text("utf-8"))
            stored = {
                f"{part}.{name}": value for part in ("unet", "text_encoder") for name, value in config.items()
            }
        else:
            stored = json.loads(file.metadata.get("lora_adapter_metadata", "{}"))
        changed = [
            name for name in _UNSUPPORTED for part in ("unet", "text_encoder") if stored.get(f"{part}.{name}")
        ]
        alphas = {part: stored.get(f"{part}.lora_alpha") for part in ("unet", "text_encoder")}
    except (OSError, ValueError, AttributeError) as error:
        where = f"'{beside}'" if is_adapter else "its metadata"
        raise CheckpointError(f"'{path}' does not say its alpha: {where} cannot be read ({error})") from error
    if changed:
        raise CheckpointError(f"'{path}' was trained with {changed[0]}, which cannot be merged here")
    return {part: float(alpha) for part, alpha in alphas.items() if alpha is not None}


def _matrices(path: Path, update: _Update, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a and B of an update, which fit each other and the weight."""
    if update.down is None or update.up is None:
        raise CheckpointError(f"'{path}' is incomplete: '{update.keys[0]}' has no counterpart")
    down, up = update.down, update.up
    rank, inputs = down.shape[0], down[0].numel()
    if up.shape[1:].numel() != rank or (up.shape[0], inputs) != (weight.shape[0], weight[0].numel()):
        raise CheckpointError(
            f"'{path}' was made for another model: '{update.keys[0]}' changes {up.shape[0]} x {inputs} "
            f"numbers, and the checkpoint has {weight.shape[0]} x {weight[0].numel()} there"
        )
    return down, up


def _merged(read: Callable[[], Tensor], down: Tensor, up: Tensor, factor: float) -> Tensor:
    weight: Tensor = read()
    update = up.flatten(1).float() @ down.flatten(1).float()
    return (weight.float() + factor * update.reshape(weight.shape)).to(weight.dtype)
