"""Folders in the layout of diffusers: configurations, weights (whole, in shards, in variants), tokenizer.

    unet/  vae/          config.json, diffusion_pytorch_model[.VARIANT].safetensors
    text_encoder/        config.json, model[.VARIANT].safetensors
    tokenizer/           see `training.network.tokenizer_files`
    scheduler/           scheduler_config.json

Weights may be .bin files of torch.save instead, of which no code is run. Source: diffusers, `ModelMixin` and
`DiffusionPipeline`, save_pretrained; transformers, `PreTrainedModel` and `CLIPTokenizer`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler

from runtime.diffusion.noise_schedule import BETA_END, BETA_START, TRAIN_TIMESTEPS
from training.network.architecture import SD21_NORM_GROUPS, ArchitectureError, Prediction
from training.network.checkpoint_file import CheckpointError, LazyTensors, TensorFile, read_tensors, reader
from training.network.stable_diffusion import ACTIVATIONS, BUILDERS, StableDiffusionArchitecture
from training.network.tokenizer_files import read_object

STEMS = {
    "unet": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "vae": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "text_encoder": ("model", "pytorch_model"),
}
"""Part -> names of its .safetensors and of its .bin file."""

CONFIGURATIONS = (
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
)

_PREDICTIONS: Mapping[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v"}

_SCHEDULE = {
    "num_train_timesteps": TRAIN_TIMESTEPS,
    "beta_start": BETA_START,
    "beta_end": BETA_END,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}
"""What a scheduler's configuration has to say where it says something: the noise schedule is this one."""

_FREE = {
    "unet": {"sample_size", "upcast_attention", "attention_head_dim", "num_attention_heads", "dropout"},
    "vae": {"sample_size", "force_upcast"},
}
"""Settings that change no result, or are read apart. Others must be those of the network that is built."""


# --- reading ----------------------------------------------------------------------------------------------


def read_architecture(folder: Path) -> StableDiffusionArchitecture:
    """Reads the configurations.

    Raises:
        CheckpointError: a configuration is missing or damaged.
        ArchitectureError: it is not of Stable Diffusion 1.x or 2.x.
    """
    if (folder / "text_encoder_2").exists():
        raise ArchitectureError("it has a second text encoder, as Stable Diffusion XL; 1.x and 2.x have one")
    unet, vae, text, scheduler = (read_object(folder / name) for name in CONFIGURATIONS)
    for name, value in _SCHEDULE.items():
        if scheduler.get(name, value) != value:
            raise ArchitectureError(
                f"its scheduler has {name} = {scheduler[name]!r}; Stable Diffusion's noise schedule has "
                f"{value!r}"
            )
    prediction = scheduler.get("prediction_type", "epsilon")
    activations = {name: encoder for encoder, name in ACTIVATIONS.items()}
    if prediction not in _PREDICTIONS or text.get("hidden_act", "quick_gelu") not in activations:
        raise ArchitectureError(
            f"it predicts {prediction!r} and its text encoder has the activation {text.get('hidden_act')!r}; "
            f"known are {', '.join(_PREDICTIONS)} and {', '.join(activations)}"
        )
    try:
        architecture = StableDiffusionArchitecture(
            unet_channels=tuple(unet["block_out_channels"]),
            unet_attention=tuple(name == "CrossAttnDownBlock2D" for name in unet["down_block_types"]),
            unet_layers=unet["layers_per_block"],
            unet_norm_groups=unet.get("norm_num_groups", SD21_NORM_GROUPS),
            unet_linear_projection=unet.get("use_linear_projection", False),
            **_unet_heads(unet),
            token_width=unet["cross_attention_dim"],
            scene_channels=unet["in_channels"] - vae["latent_channels"],
            latent_channels=vae["latent_channels"],
            vae_channels=tuple(vae["block_out_channels"]),
            vae_layers=vae["layers_per_block"],
            vae_norm_groups=vae.get("norm_num_groups", SD21_NORM_GROUPS),
            prediction=_PREDICTIONS[prediction],
            text_encoder=activations[text.get("hidden_act", "quick_gelu")],
            text_width=text["hidden_size"],
            text_layers=text["num_hidden_layers"],
            text_heads=text["num_attention_heads"],
            text_mlp_width=text["intermediate_size"],
            text_vocabulary=text["vocab_size"],
            text_positions=text["max_position_embeddings"],
        )
        _check_settings(architecture, {"unet": unet, "vae": vae})
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ArchitectureError(f"its configurations do not describe a network ({error!r})") from error
    return architecture


def read_size(folder: Path, latent_factor: int) -> tuple[int, int] | None:
    """Reads the (height, width) of the pictures, in pixels, that a pipeline of diffusers draws unless it is
    told otherwise; None if the folder does not say it.

    Raises:
        CheckpointError: the configuration of the UNet is missing or damaged.
        ArchitectureError: what it says is no size.
    """
    stored = read_object(folder / "unet" / "config.json").get("sample_size")
    if stored is None:
        return None
    sides = stored if isinstance(stored, list) else [stored, stored]
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ArchitectureError(f"its unet has sample_size = {stored!r}, which is not the size of a latent")
    return sides[0] * latent_factor, sides[1] * latent_factor


def _unet_heads(unet: Mapping[str, Any]) -> dict[str, int]:
    """Returns one number of heads for all levels, or one width. diffusers calls their number
    attention_head_dim."""
    heads = unet.get("num_attention_heads") or unet.get("attention_head_dim", 8)
    channels = unet["block_out_channels"]
    if isinstance(heads, int):
        return {"unet_head_count": heads}
    widths = {width // number for width, number in zip(channels, heads)}
    if len(widths) == 1:
        return {"unet_head_width": widths.pop()}
    if len(set(heads)) == 1:
        return {"unet_head_count": heads[0]}
    raise ArchitectureError(f"its UNet has {heads} attention heads, neither all alike nor of one width")


def _check_settings(
    architecture: StableDiffusionArchitecture, configurations: Mapping[str, Mapping[str, Any]]
) -> None:
    """Compares what a folder says of its networks with the networks that are built for it."""
    for part, stored in configurations.items():
        with torch.device("meta"):
            network: Any = BUILDERS[part](architecture)
        built = network.config
        for name, value in stored.items():
            if name in built and name not in _FREE[part] and not name.startswith("_"):
                ours = built[name]
                if _plain(value) != _plain(ours):
                    raise ArchitectureError(
                        f"its {part} has {name} = {value!r}; that of Stable Diffusion "
                        f"{architecture.version} has {ours!r}"
                    )


def _plain(value: Any) -> Any:
    """Returns one value where a list says the same for every level."""
    if isinstance(value, (list, tuple)):
        return value[0] if len(set(value)) == 1 else list(value)
    return value


def read_part(folder: Path, part: str, variant: str | None) -> TensorFile:
    """Opens the weights of one part, under the names of its module.

    Args:
        folder: of the checkpoint.
        part: unet, vae or text_encoder.
        variant: like fp16 or non_ema; if None, the plain weights, or the only variant that is there.

    Raises:
        CheckpointError: there are none, they are damaged, or there are several variants to choose from.
    """
    path = _find_weights(folder / part, *STEMS[part], variant)
    file = read_tensors(path)
    names = {_module_name(part, key): key for key in file.shapes if not key.endswith(".position_ids")}
    tensors = LazyTensors({name: reader(file.tensors, key) for name, key in names.items()})
    return TensorFile(tensors, {name: file.shapes[key] for name, key in names.items()}, paths=file.paths)


def _find_weights(folder: Path, stem: str, bin_stem: str, variant: str | None) -> Path:
    pattern = re.compile(
        rf"{stem}(?:\.([\w-]+))?\.safetensors|{stem}\.safetensors\.index(?:\.([\w-]+))?\.json|"
        rf"{bin_stem}(?:\.([\w-]+))?\.bin|{bin_stem}\.bin\.index(?:\.([\w-]+))?\.json"
    )
    found: dict[str, Path] = {}
    # .safetensors before .bin, the whole before shards
    for path in sorted(folder.glob("*"), key=lambda path: (".bin" in path.name, path.suffix == ".json")):
        if (match := pattern.fullmatch(path.name)) and not re.search(r"-\d{5}-of-\d{5}", path.name):
            found.setdefault(next(filter(None, match.groups()), ""), path)
    wanted = variant or ("" if "" in found or len(found) != 1 else next(iter(found)))
    if wanted in found:
        return found[wanted]
    others = ", ".join(sorted(filter(None, found)))
    raise CheckpointError(
        f"'{folder}' has no {f'weights of the variant {variant!r}' if variant else f'{stem}.safetensors'}"
        + (f": choose one of the variants {others}" if others else "")
    )


_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names in autoencoders that were saved before diffusers 0.15."""


def _module_name(part: str, key: str) -> str:
    if part == "text_encoder":
        return key.removeprefix("text_model.")  # transformers before version 5 has it
    if part == "vae":
        return re.sub(
            r"(\.attentions\.0\.)(query|key|value|proj_attn)\.",
            lambda match: f"{match[1]}{_OLD_VAE_ATTENTION[match[2]]}.",
            key,
        )
    return key


# --- writing ----------------------------------------------------------------------------------------------


def write_scheduler(folder: Path, architecture: StableDiffusionArchitecture) -> None:
    """Writes the configuration of a DDIM scheduler with Stable Diffusion's noise schedule."""
    names = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
    DDIMScheduler(
        **_SCHEDULE,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=names[architecture.prediction],
    ).save_pretrained(folder / "scheduler")
