"""Checkpoints as people have them: wrapped, averaged, rounded, in shards, renamed, with keys beside."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.seeded import TINY
from training.network.architecture import settings_to_metadata
from training.network.checkpoint import read_checkpoint, write_checkpoint
from training.network.checkpoint_file import CheckpointError, read_tensors, weight_files

Tensors = dict[str, Tensor]

UNET = "model.diffusion_model."
KEY = f"{UNET}out.2.bias"
HEADS = {"unet_head_width": TINY.unet_head_width, "dino_heads": TINY.dino_heads}


@pytest.fixture(scope="module")
def weights(tiny_checkpoint: Path) -> Tensors:
    return load_file(tiny_checkpoint)


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + key: tensor for key, tensor in tensors.items()}


def assert_same(path: Path, expected: Tensors, **options: Any) -> None:
    found = read_checkpoint(path, **HEADS, **options).tensors
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize(
    "change",
    [
        lambda key: f"module.{key}",
        lambda key: f"state_dict.{key}",
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: f"anydoor.net.{key}",
        lambda key: key.replace("diffusion_model.", "diffusion_model._orig_mod."),
        lambda key: key.replace("control_model.", "control_model.module."),
    ],
)
def test_names_of_wrappers_are_taken_off_the_keys(
    weights: Tensors, tmp_path: Path, change: Callable[[str], str]
) -> None:
    save_file({change(key): tensor for key, tensor in weights.items()}, tmp_path / "a.safetensors")
    assert_same(tmp_path / "a.safetensors", weights)


class AttributeDict(dict[str, Any]):
    """As Lightning's, which keeps hyperparameters in one."""


class Shards(list[Any]):
    """A list that is not quite one."""


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: {"state_dict": t, "hyper_parameters": AttributeDict(a=1, b=AttributeDict())},
        lambda t: {"state_dict": AttributeDict(t), "loops": Shards([defaultdict(list, {"a": [1]}), {1, 2}])},
        lambda t: {"model": t, "iteration": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(4)}}}},
        lambda t: {"module": prefixed("module.", t)},
        lambda t: {"state_dict": {"model": {key: nn.Parameter(tensor) for key, tensor in t.items()}}},
        lambda t: {"network": prefixed("_orig_mod.", t)},
    ],
)
def test_dictionaries_around_the_weights_are_opened(
    weights: Tensors, tmp_path: Path, wrap: Callable[[Tensors], object]
) -> None:
    torch.save(wrap(weights), tmp_path / "a.pth")
    assert_same(tmp_path / "a.pth", weights)


@pytest.mark.parametrize("name", ["A.SAFETENSORS", "a.ckpt", "a", "a.safetensors.part"])
def test_a_file_is_what_it_holds_and_not_what_it_is_called(
    weights: Tensors, tmp_path: Path, name: str
) -> None:
    save_file(weights, tmp_path / "weights")
    (tmp_path / "weights").rename(tmp_path / name)
    assert_same(tmp_path / name, weights)
    torch.save(weights, tmp_path / name)
    assert_same(tmp_path / name, weights)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
def test_eight_bits_are_widened_exactly(
    weights: Tensors, tmp_path: Path, dtype: torch.dtype, name: str
) -> None:
    rounded = {key: t.to(dtype) if t.ndim > 1 else t for key, t in weights.items()}
    (save_file if name.endswith("safetensors") else torch.save)(rounded, tmp_path / name)
    checkpoint = read_checkpoint(tmp_path / name, **HEADS)
    key = f"{UNET}input_blocks.0.0.weight"
    assert checkpoint.tensors[key].dtype == torch.float16
    assert torch.equal(checkpoint.tensors[key].float(), rounded[key].float())
    unet = checkpoint.load_part("unet", torch.float32).official_state_dict()
    assert torch.equal(unet[key], rounded[key].float())


def test_a_schedule_in_half_precision_is_computed_anew(weights: Tensors, tmp_path: Path) -> None:
    """In bfloat16 the first steps would have no noise at all."""
    save_file({key: t.bfloat16() for key, t in weights.items()}, tmp_path / "a.safetensors")
    assert weights["alphas_cumprod"].bfloat16()[0] == 1
    assert read_checkpoint(tmp_path / "a.safetensors", **HEADS).alphas_cumprod is None


def test_integers_are_no_weights(weights: Tensors, tmp_path: Path) -> None:
    save_file({**weights, KEY: weights[KEY].to(torch.int8)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=f"weights of int8 \\('{KEY}'\\), so it is quantised"):
        read_checkpoint(tmp_path / "a.safetensors", **HEADS).load_part("unet")


# --- averages ---------------------------------------------------------------------------------------------


def in_the_originals_way(weights: Tensors, averages: Tensors) -> object:
    names = {key: f"model_ema.{key.removeprefix('model.').replace('.', '')}" for key in averages}
    counters = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(5)}
    return weights | counters | {names[key]: tensor for key, tensor in averages.items()}


@pytest.mark.parametrize(
    "save",
    [
        in_the_originals_way,
        lambda w, a: {"state_dict": prefixed("module.", in_the_originals_way(w, a))},  # type: ignore[arg-type]
        lambda w, a: {"model": w, "model_ema": w | a},
        lambda w, a: {"state_dict": w, "ema_state_dict": prefixed("module.", w | a)},
        lambda w, a: prefixed("online_model.", w) | prefixed("ema_model.", w | a),
    ],
)
def test_averages_are_left_out_or_taken(
    weights: Tensors, tmp_path: Path, save: Callable[[Tensors, Tensors], object]
) -> None:
    averages = {key: tensor + 1 for key, tensor in weights.items() if key.startswith(UNET)}
    path = tmp_path / "a.ckpt"
    torch.save(save(weights, averages), path)
    assert_same(path, weights)
    assert "its averages (EMA) are left out: --ema takes them" in read_checkpoint(path, **HEADS).describe()
    assert_same(path, weights | averages, ema=True)
    assert "EMA" not in read_checkpoint(path, **HEADS, ema=True).describe()


def test_averages_that_are_not_there(tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no averages \(EMA\): leave out --ema"):
        read_checkpoint(tiny_checkpoint, ema=True)


# --- keys beside ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    ["scale_factor", "lpips_loss.net.0.weight", "cond_stage_model.encoder.mask", "first_stage_model.loss.a"],
)
def test_keys_that_no_part_needs_are_left_out_and_named(weights: Tensors, tmp_path: Path, key: str) -> None:
    save_file({**weights, key: torch.zeros(1)}, tmp_path / "a.safetensors")
    assert_same(tmp_path / "a.safetensors", weights)
    assert (
        read_checkpoint(tmp_path / "a.safetensors", **HEADS)
        .describe()
        .endswith(f"; no part needs 1 of its keys ('{key}')")
    )


@pytest.mark.parametrize(
    "key",
    [
        f"{UNET}label_emb.0.weight",
        f"{UNET}input_blocks.1.0.to_k_ip.weight",
        "control_model.label_emb.0.weight",
        "cond_stage_model.model.register_tokens",
        "first_stage_model.decoder.extra.weight",
    ],
)
def test_keys_that_would_change_the_network_are_refused(weights: Tensors, tmp_path: Path, key: str) -> None:
    save_file({**weights, key: torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=f"1 keys are unexpected \\('{key}'\\)"):
        read_checkpoint(tmp_path / "a.safetensors", **HEADS)


# --- shards -----------------------------------------------------------------------------------------------


@pytest.fixture
def shards(weights: Tensors, tmp_path: Path) -> Path:
    """A folder as huggingface_hub writes it."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    keys = sorted(weights)
    parts = dict(zip(names, (keys[::2], keys[1::2])))
    for name, part in parts.items():
        save_file({key: weights[key] for key in part}, folder / name, settings_to_metadata(TINY))
    places = {key: name for name, part in parts.items() for key in part}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_are_read_from_their_folder_or_their_index(weights: Tensors, shards: Path) -> None:
    for path in (shards, shards / "model.safetensors.index.json"):
        assert_same(path, weights)
        assert read_checkpoint(path).architecture == TINY
        assert [file.name for file in weight_files(path)] == [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        ]


def test_a_shard_alone_is_named_as_what_it_is(shards: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is part 2 of 2 .* the index 'model.safetensors.index.json'"):
        read_checkpoint(shards / "model-00002-of-00002.safetensors")
    (shards / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="holds shards without their index"):
        read_checkpoint(shards)


def test_a_shard_that_is_missing(shards: Path) -> None:
    (shards / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"there is no checkpoint at '.*model-00002-of-00002.safetensors'"
    ):
        read_checkpoint(shards)


@pytest.mark.parametrize("place", ["../a.safetensors", "..", "", "/etc/passwd"])
def test_an_index_that_leaves_its_folder(tmp_path: Path, place: str) -> None:
    path = tmp_path / "a.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": place}}))
    with pytest.raises(CheckpointError, match=r"not in its folder|there is no checkpoint at"):
        read_tensors(path)


def test_the_folder_of_one_checkpoint(weights: Tensors, tiny_checkpoint: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.safetensors", weights, TINY)
    (tmp_path / "README.md").touch()
    assert_same(tmp_path, weights)
    (tmp_path / "b.ckpt").touch()
    with pytest.raises(CheckpointError, match=r"holds 2 checkpoints: name one of a.safetensors, b.ckpt"):
        read_checkpoint(tmp_path)


# --- other files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html>Virus scan warning</html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run 'git lfs pull'"),
        (b"\x1f\x8b\x08" + bytes(99), "packed with gzip: unpack it"),
        (bytes(4096), "it begins with zeros, as an unfinished download"),
        (b"GGUF\x03", "in the format GGUF"),
        (b"\x80\x04.", "it is a pickle, which can run code"),
        (b"anything else", "neither .safetensors nor a file of torch.save"),
        (b"PK\x03\x04 cut short", "damaged or incomplete"),
    ],
)
@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
def test_what_is_no_checkpoint_is_named(tmp_path: Path, content: bytes, sentence: str, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=sentence) as refusal:
        read_tensors(tmp_path / name)
    assert "\n" not in str(refusal.value)


def test_files_of_torch_that_hold_no_dictionary(weights: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(CheckpointError, match=r"an object of the class torch.nn.modules.linear.Linear: save"):
        read_tensors(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match=r"holds no named tensors but a list: save its state_dict\(\)"):
        read_tensors(path)
    torch.save({"a": torch.zeros(1)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before PyTorch 1.6: read it with torch.load"):
        read_tensors(path)
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)  # type: ignore[no-untyped-call]
    with pytest.raises(CheckpointError, match=r"it is a TorchScript program: load it, and save"):
        read_tensors(path)


@pytest.mark.parametrize(
    "key", ["cls_token", "blocks.0.mlp.w12.weight", "patch_embed.proj.weight", "pos_embed"]
)
def test_a_dinov2_of_odd_shapes_is_refused(tiny_checkpoint: Path, tmp_path: Path, key: str) -> None:
    path, tensors = tmp_path / "a.safetensors", load_file(tiny_checkpoint)
    save_file({**tensors, f"cond_stage_model.model.{key}": torch.zeros(())}, path)
    with pytest.raises(CheckpointError, match="not an AnyDoor checkpoint: the shapes of its tensors do not"):
        read_checkpoint(path, unet_head_width=8, dino_heads=2)


def test_a_checkpoint_without_dinov2_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.safetensors", load_file(tiny_checkpoint)
    save_file({k: v for k, v in tensors.items() if not k.startswith("cond_stage_model.model.")}, path)
    with pytest.raises(CheckpointError, match="not an AnyDoor checkpoint: it has no DINOv2: nothing begins"):
        read_checkpoint(path, unet_head_width=8, dino_heads=2)
