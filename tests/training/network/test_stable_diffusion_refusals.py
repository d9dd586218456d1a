"""Stable Diffusion checkpoints that are wrong, mixed or cut short are refused in one sentence each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.stable_diffusion import change_json, folder, single_file
from training.network.checkpoint_file import CheckpointError
from training.network.stable_diffusion_checkpoint import read_stable_diffusion


@pytest.mark.parametrize(
    ("file", "name", "value", "message"),
    [
        ("unet/config.json", "act_fn", "gelu", "its unet has act_fn = 'gelu'; that of .* has 'silu'"),
        ("unet/config.json", "in_channels", 7, "its UNet takes 7 channels: expected 4, or 9 with mask"),
        (
            "unet/config.json",
            "cross_attention_dim",
            96,
            "tokens of 96 numbers .* makes them of 64: the two are",
        ),
        ("unet/config.json", "attention_head_dim", 7, "number of attention heads does not divide"),
        ("unet/config.json", "attention_head_dim", [0, 2], "do not describe a network"),
        ("unet/config.json", "addition_embed_type", "text_time", "its unet has addition_embed_type"),
        ("unet/config.json", "block_out_channels", [64], "unet_channels names 1 levels"),
        ("unet/config.json", "block_out_channels", None, "do not describe a network"),
        ("unet/config.json", "layers_per_block", 2, r"in unet/, \d+ of \d+ keys are missing"),
        ("vae/config.json", "scaling_factor", 0.13025, "its vae has scaling_factor = 0.13025"),
        ("text_encoder/config.json", "hidden_act", "relu", "activation 'relu'; known are"),
        ("text_encoder/config.json", "vocab_size", 500, "wrong shape"),
        (
            "scheduler/scheduler_config.json",
            "beta_schedule",
            "linear",
            "scheduler has beta_schedule = 'linear'",
        ),
        ("scheduler/scheduler_config.json", "prediction_type", "sample", "it predicts 'sample'"),
    ],
)
def test_configurations_that_are_not_stable_diffusion(
    tmp_path: Path, file: str, name: str, value: object, message: str
) -> None:
    change_json(folder(tmp_path) / file, lambda content: content.update({name: value}))
    with pytest.raises(CheckpointError, match=message) as refusal:
        read_stable_diffusion(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("unet/config.json", "there is no '.*unet/config.json'"),
        ("vae/diffusion_pytorch_model.safetensors", "vae' has no diffusion_pytorch_model.safetensors"),
        ("text_encoder", "there is no '.*text_encoder/config.json'"),
        ("tokenizer/tokenizer.json", "there is no '.*vocab.json'"),
    ],
)
def test_incomplete_folders(tmp_path: Path, missing: str, message: str) -> None:
    path = folder(tmp_path) / missing
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match=message):
        read_stable_diffusion(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_damaged_configurations(tmp_path: Path, content: bytes) -> None:
    (folder(tmp_path) / "vae" / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"vae/config.json' (cannot be read|is not a JSON object)"):
        read_stable_diffusion(tmp_path)


def test_stable_diffusion_xl_is_refused(tmp_path: Path) -> None:
    (folder(tmp_path) / "text_encoder_2").mkdir()
    with pytest.raises(CheckpointError, match="second text encoder, as Stable Diffusion XL"):
        read_stable_diffusion(tmp_path)


def test_shards_of_two_models_are_refused(tmp_path: Path) -> None:
    folder(tmp_path, max_shard_size="1MB")
    index = tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    places = json.loads(index.read_text("utf-8"))["weight_map"]
    first, second = sorted(set(places.values()))[:2]
    shutil.copy(index.with_name(first), index.with_name(second))
    with pytest.raises(CheckpointError, match=f"says that '{second}' has '.*', and it has not"):
        read_stable_diffusion(tmp_path)
    index.with_name(second).unlink()
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        read_stable_diffusion(tmp_path)


def test_a_shard_outside_the_folder_is_refused(tmp_path: Path) -> None:
    folder(tmp_path, max_shard_size="1MB")
    index = tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    change_json(index, lambda content: content["weight_map"].update({"conv_in.bias": "../other.safetensors"}))
    with pytest.raises(CheckpointError, match=r"names the shard '../other.safetensors', which is not in"):
        read_stable_diffusion(tmp_path)


def without(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if not key.startswith(prefix)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model.diffusion_model.out."), r"4 of \d+ keys are missing"),
        (without("cond_stage_model."), "it has no text encoder"),
        (without("first_stage_model."), "'first_stage_model.post_quant_conv.weight' is missing"),
        (without("cond_stage_model.transformer.text_model.encoder.layers.0"), "keys? are missing|is missing"),
        (
            lambda tensors: tensors | {"control_model.a": torch.zeros(3)},
            r"1 keys are unexpected \('control_model.a'\)",
        ),
    ],
)
def test_single_files_that_are_not_complete(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    path = single_file(tmp_path / "file.safetensors")
    save_file(change(load_file(path)), path)
    with pytest.raises(CheckpointError, match=message) as refusal:
        read_stable_diffusion(path)
    assert "\n" not in str(refusal.value)


def test_a_text_encoder_of_another_model(tmp_path: Path) -> None:
    path = single_file(tmp_path / "file.safetensors")
    narrow = {
        key: tensor[..., :32].contiguous() if "attn2.to_k" in key or "attn2.to_v" in key else tensor
        for key, tensor in load_file(path).items()
    }
    save_file(narrow, path)
    with pytest.raises(
        CheckpointError, match="reads tokens of 32 numbers and its text encoder makes them of 64"
    ):
        read_stable_diffusion(path)


def test_a_truncated_single_file(tmp_path: Path) -> None:
    path = single_file(tmp_path / "file.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        read_stable_diffusion(path)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_truncated_part_of_a_folder(tmp_path: Path, part: str) -> None:
    [path] = (folder(tmp_path) / part).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="damaged or incomplete") as refusal:
        read_stable_diffusion(tmp_path)
    assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_unet_of_another_version_is_refused(tmp_path: Path) -> None:
    """That of 1.x, whose projections are convolutions, in a folder of 2.x."""
    name = "unet/diffusion_pytorch_model.safetensors"
    mixed, older = folder(tmp_path / "mixed", "2.x"), folder(tmp_path / "older", "1.x")
    shutil.copy(older / name, mixed / name)
    with pytest.raises(CheckpointError, match=r"in unet/, .* tensors have the wrong shape") as refusal:
        read_stable_diffusion(mixed)
    assert "\n" not in str(refusal.value)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    path = folder(tmp_path) / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_out.bias"][1] = float("nan")
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"not finite numbers.*'conv_out.bias'"):
        read_stable_diffusion(tmp_path).load_part("unet")


def test_keys_that_no_part_needs_are_left_out_and_named(tmp_path: Path) -> None:
    path = single_file(tmp_path / "file.safetensors")
    tensors = load_file(path)
    more = {"scale_factor": torch.zeros(1), "lora.up": torch.zeros(1)}
    save_file({f"module.{key}": tensor for key, tensor in (tensors | more).items()}, path)
    described = read_stable_diffusion(path).describe()
    assert described.endswith("; no part needs 2 of its keys ('lora.up', 'scale_factor')")


def test_averages_are_left_out_or_taken(tmp_path: Path) -> None:
    path = single_file(tmp_path / "file.safetensors")
    tensors = load_file(path)
    key = "model.diffusion_model.out.2.bias"
    average = f"model_ema.{key.removeprefix('model.').replace('.', '')}"
    save_file(tensors | {average: tensors[key] + 1}, path)
    for ema in (False, True):
        bias = read_stable_diffusion(path, ema=ema).parts["unet"]["conv_out.bias"]
        assert torch.equal(bias, tensors[key] + ema)
