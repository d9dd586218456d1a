"""LoRA files, merged: as PEFT merges them, whatever their keys are called."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.stable_diffusion import pipeline, weights
from training.network.checkpoint_file import CheckpointError
from training.network.lora import merge_lora
from training.network.stable_diffusion_checkpoint import StableDiffusionCheckpoint, read_stable_diffusion

needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")

RANK = 4
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
TEXT = "encoder.layers.1.self_attn"
UNET_MODULES = (f"{ATTENTION}.to_q", f"{ATTENTION}.to_out.0", "mid_block.attentions.0.proj_in")
TEXT_MODULES = (f"{TEXT}.q_proj", f"{TEXT}.out_proj")


@pytest.fixture
def checkpoint(tmp_path: Path) -> StableDiffusionCheckpoint:
    pipeline("1.x").save_pretrained(tmp_path / "checkpoint")
    return read_stable_diffusion(tmp_path / "checkpoint")


def matrices(checkpoint: StableDiffusionCheckpoint) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """(Part, module) -> A and B, of linear layers and of a convolution."""
    generator = torch.Generator().manual_seed(1)
    result = {}
    for part, modules in (("unet", UNET_MODULES), ("text_encoder", TEXT_MODULES)):
        for module in modules:
            rows, columns, *ones = checkpoint.parts[part][f"{module}.weight"].shape
            down = torch.randn(RANK, columns, *ones, generator=generator)
            result[part, module] = down, torch.randn(rows, RANK, *ones, generator=generator)
    return result


def diffusers_keys(part: str, module: str) -> tuple[str, str]:
    module = f"text_model.{module}" if part == "text_encoder" else module
    return f"{part}.{module}.lora_A.weight", f"{part}.{module}.lora_B.weight"


def old_diffusers_keys(part: str, module: str) -> tuple[str, str]:
    if part == "text_encoder":
        module = module.replace("q_proj", "to_q_lora").replace("out_proj", "to_out_lora")
        return tuple(f"text_encoder.text_model.{module}.{way}.weight" for way in ("down", "up"))  # type: ignore[return-value]
    if ".attn1." not in module:
        return f"unet.{module}.lora.down.weight", f"unet.{module}.lora.up.weight"
    module = module.replace(".attn1.", ".attn1.processor.").removesuffix(".0")
    return f"unet.{module}_lora.down.weight", f"unet.{module}_lora.up.weight"


def peft_keys(part: str, module: str) -> tuple[str, str]:
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def kohya_keys(part: str, module: str) -> tuple[str, str]:
    stem = f"lora_te_text_model_{module}" if part == "text_encoder" else f"lora_unet_{module}"
    stem = stem.replace(".", "_")
    return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"


Keys = Callable[[str, str], tuple[str, str]]


def write_lora(path: Path, checkpoint: StableDiffusionCheckpoint, keys: Keys) -> Path:
    tensors = {}
    for place, (down, up) in matrices(checkpoint).items():
        tensors |= dict(zip(keys(*place), (down, up), strict=True))
    save_file(tensors, path)
    return path


def assert_merged(
    merged: StableDiffusionCheckpoint, original: StableDiffusionCheckpoint, scale: float
) -> None:
    changed = matrices(original)
    for part, tensors in original.parts.items():
        for name, tensor in tensors.items():
            place = part, name.removesuffix(".weight")
            if place not in changed or name.endswith("bias"):
                assert torch.equal(merged.parts[part][name], tensor)
                continue
            down, up = (each.flatten(1).double() for each in changed[place])
            expected = tensor.double() + scale * (up @ down).reshape(tensor.shape)
            torch.testing.assert_close(merged.parts[part][name].double(), expected, atol=1e-5, rtol=1e-5)


# --- merging ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [diffusers_keys, old_diffusers_keys, kohya_keys])
def test_every_style_of_keys(tmp_path: Path, checkpoint: StableDiffusionCheckpoint, keys: Keys) -> None:
    path = write_lora(tmp_path / "lora.safetensors", checkpoint, keys)
    assert_merged(merge_lora(checkpoint, path), checkpoint, 1.0)
    assert_merged(merge_lora(checkpoint, path, 0.25), checkpoint, 0.25)


def test_adapter_of_peft_has_its_alpha_beside_it(
    tmp_path: Path, checkpoint: StableDiffusionCheckpoint
) -> None:
    path = write_lora(tmp_path / "adapter_model.safetensors", checkpoint, peft_keys)
    with pytest.raises(
        CheckpointError, match=r"does not say its alpha: '.*adapter_config.json' cannot be read"
    ):
        merge_lora(checkpoint, path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 8}), "utf-8")
    assert_merged(merge_lora(checkpoint, path), checkpoint, 8 / RANK)


def test_alpha_of_kohya_is_a_tensor(tmp_path: Path, checkpoint: StableDiffusionCheckpoint) -> None:
    path = tmp_path / "lora.safetensors"
    tensors = {}
    for place, pair in matrices(checkpoint).items():
        keys = kohya_keys(*place)
        tensors |= dict(zip(keys, pair, strict=True))
        tensors[keys[0].replace("lora_down.weight", "alpha")] = torch.tensor(1.0)
    save_file(tensors, path)
    assert_merged(merge_lora(checkpoint, path, 2.0), checkpoint, 2.0 / RANK)


def test_alpha_of_diffusers_is_metadata(tmp_path: Path, checkpoint: StableDiffusionCheckpoint) -> None:
    path = tmp_path / "lora.safetensors"
    tensors = {}
    for place, pair in matrices(checkpoint).items():
        tensors |= dict(zip(diffusers_keys(*place), pair, strict=True))
    config = {"unet.lora_alpha": 2, "text_encoder.lora_alpha": 2, "unet.r": RANK}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(config)})
    assert_merged(merge_lora(checkpoint, path), checkpoint, 2 / RANK)
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(config | {"unet.use_dora": True})})
    with pytest.raises(CheckpointError, match="trained with use_dora, which cannot be merged"):
        merge_lora(checkpoint, path)


def test_two_files_add_up(tmp_path: Path, checkpoint: StableDiffusionCheckpoint) -> None:
    path = write_lora(tmp_path / "lora.safetensors", checkpoint, kohya_keys)
    assert_merged(merge_lora(merge_lora(checkpoint, path, 0.5), path, 0.75), checkpoint, 1.25)


def test_merging_keeps_half_precision(tmp_path: Path) -> None:
    halved = copy.deepcopy(pipeline("1.x"))
    halved.to(torch.float16).save_pretrained(tmp_path / "checkpoint")
    checkpoint = read_stable_diffusion(tmp_path / "checkpoint")
    merged = merge_lora(checkpoint, write_lora(tmp_path / "lora.safetensors", checkpoint, kohya_keys))
    assert {tensor.dtype for tensor in merged.parts["unet"].values()} == {torch.float16}


@needs_peft
def test_merged_weights_are_those_of_peft(tmp_path: Path) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(2)
    theirs: Any = copy.deepcopy(pipeline("1.x"))
    theirs.save_pretrained(tmp_path / "checkpoint")
    targets = {
        "unet": ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1"],
        "text_encoder": ["q_proj", "out_proj", "fc1"],
    }
    layers = {}
    for part, modules in targets.items():
        network = getattr(theirs, part)
        network.add_adapter(LoraConfig(r=RANK, lora_alpha=6, target_modules=modules, init_lora_weights=False))
        state = get_peft_model_state_dict(network, adapter_name="default")
        layers[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(state)
    theirs.save_lora_weights(
        tmp_path,
        **layers,
        unet_lora_adapter_metadata={"r": RANK, "lora_alpha": 6},
        text_encoder_lora_adapter_metadata={"r": RANK, "lora_alpha": 6},
    )
    theirs.fuse_lora(components=["unet", "text_encoder"], lora_scale=0.7)
    theirs.unload_lora_weights()
    checkpoint = read_stable_diffusion(tmp_path / "checkpoint")
    merged = merge_lora(checkpoint, tmp_path / "pytorch_lora_weights.safetensors", 0.7)
    changed = 0
    for part, tensors in weights(theirs).items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(merged.parts[part][name], tensor, atol=1e-6, rtol=1e-6)
            changed += not torch.equal(checkpoint.parts[part][name], tensor)
    assert changed > 20


# --- refusals ---------------------------------------------------------------------------------------------


def test_unknown_keys_are_named(tmp_path: Path, checkpoint: StableDiffusionCheckpoint) -> None:
    path = tmp_path / "lora.safetensors"
    keys = [f"lora_te1_text_model_encoder_layers_{i}_mlp_fc1.lora_up.weight" for i in range(5)]
    save_file({key: torch.zeros(2, 2) for key in keys}, path)
    with pytest.raises(
        CheckpointError, match=r"5 of its 5 keys are unknown \('lora_te1_.*', '.*', '.*' and 2"
    ):
        merge_lora(checkpoint, path)


def test_half_of_an_update_is_refused(tmp_path: Path, checkpoint: StableDiffusionCheckpoint) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({f"unet.{UNET_MODULES[0]}.lora_A.weight": torch.zeros(RANK, 64)}, path)
    with pytest.raises(CheckpointError, match=r"incomplete: 'unet\..*lora_A.weight' has no counterpart"):
        merge_lora(checkpoint, path)


def test_a_lora_for_another_model_is_refused(tmp_path: Path, checkpoint: StableDiffusionCheckpoint) -> None:
    path = tmp_path / "lora.safetensors"
    down, up = diffusers_keys("unet", UNET_MODULES[0])
    save_file({down: torch.zeros(RANK, 320), up: torch.zeros(320, RANK)}, path)
    with pytest.raises(
        CheckpointError, match=r"for another model: .* changes 320 x 320 numbers, and .* 64 x 64"
    ):
        merge_lora(checkpoint, path)


def test_a_file_that_is_no_lora(tmp_path: Path, checkpoint: StableDiffusionCheckpoint) -> None:
    path = checkpoint.path / "vae" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(CheckpointError, match="is not a LoRA for this checkpoint"):
        merge_lora(checkpoint, path)
