"""Stable Diffusion checkpoints: whatever their layout, the weights are those that diffusers has."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.stable_diffusion import Version, change_json, folder, pipeline, single_file, weights
from training.network.checkpoint_file import CheckpointError, read_tensors
from training.network.official_keys import expected_shapes
from training.network.stable_diffusion import BUILDERS, StableDiffusionArchitecture, infer_stable_diffusion
from training.network.stable_diffusion_checkpoint import (
    StableDiffusionCheckpoint,
    is_stable_diffusion,
    read_stable_diffusion,
    write_folder,
    write_single_file,
)

STABLE_DIFFUSION_1 = StableDiffusionArchitecture(
    unet_head_count=8,
    unet_linear_projection=False,
    token_width=768,
    text_encoder="clip",
    text_width=768,
    text_layers=12,
    text_heads=12,
    text_mlp_width=3072,
)
STABLE_DIFFUSION_2 = StableDiffusionArchitecture()

every_kind = pytest.mark.parametrize(
    ("version", "inpaint", "prediction_type"),
    [
        ("1.x", False, "epsilon"),
        ("1.x", True, "epsilon"),
        ("2.x", False, "v_prediction"),
        ("2.x", True, "epsilon"),
    ],
)
both_versions = pytest.mark.parametrize("version", ["1.x", "2.x"])


def assert_same_weights(
    checkpoint: StableDiffusionCheckpoint, expected: dict[str, dict[str, Tensor]]
) -> None:
    for part, tensors in expected.items():
        assert set(checkpoint.parts[part]) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint.parts[part][name], tensor), name


# --- what it is -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "numbers"),
    [
        (STABLE_DIFFUSION_1, {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}),
        (STABLE_DIFFUSION_2, {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840}),
    ],
)
def test_full_size_networks_have_as_many_weights_as_the_published_ones(
    architecture: StableDiffusionArchitecture, numbers: dict[str, int]
) -> None:
    with torch.device("meta"):
        modules = {part: build(architecture) for part, build in BUILDERS.items()}
    assert {part: sum(p.numel() for p in module.parameters()) for part, module in modules.items()} == numbers


@pytest.mark.parametrize("architecture", [STABLE_DIFFUSION_1, STABLE_DIFFUSION_2], ids=["1.x", "2.x"])
@pytest.mark.parametrize("scene_channels", [0, 5])
def test_architecture_is_read_off_the_shapes_of_a_full_size_file(
    architecture: StableDiffusionArchitecture, scene_channels: int
) -> None:
    architecture = replace(architecture, scene_channels=scene_channels)
    shapes: dict[str, tuple[int, ...]] = {}
    for part, layout in {"unet": "unet", "vae": "vae", "text_encoder": architecture.text_encoder}.items():
        with torch.device("meta"):
            names = {name: tensor.shape for name, tensor in BUILDERS[part](architecture).state_dict().items()}
        shapes |= expected_shapes(layout, names, architecture)
    assert infer_stable_diffusion(shapes, {}) == architecture


@every_kind
def test_architecture_is_read_off_a_folder(
    tmp_path: Path, version: Version, inpaint: bool, prediction_type: str
) -> None:
    pipeline(version, inpaint, prediction_type).save_pretrained(tmp_path)
    found = read_stable_diffusion(tmp_path).architecture
    assert found.version == version
    assert found.scene_channels == (5 if inpaint else 0)
    assert found.prediction == {"epsilon": "epsilon", "v_prediction": "v"}[prediction_type]
    assert found.unet_heads == ((8, 8) if version == "1.x" else (1, 2))
    assert found.unet_linear_projection == (version == "2.x")
    assert (found.text_layers, found.text_width, found.token_width) == (2, 64, 64)


@every_kind
def test_single_file_says_the_same_as_the_folder(
    tmp_path: Path, version: Version, inpaint: bool, prediction_type: str
) -> None:
    pipeline(version, inpaint, prediction_type).save_pretrained(tmp_path / "folder")
    checkpoint = read_stable_diffusion(tmp_path / "folder")
    write_single_file(tmp_path / "file.safetensors", checkpoint)
    assert read_stable_diffusion(tmp_path / "file.safetensors").architecture == checkpoint.architecture


@both_versions
def test_what_a_published_file_does_not_say_is_as_in_its_version(tmp_path: Path, version: Version) -> None:
    checkpoint = read_stable_diffusion(single_file(tmp_path / "file.safetensors", version))
    assert checkpoint.architecture == read_stable_diffusion(tmp_path / "source").architecture
    assert "predicts the noise (assumed, because the file does not say)" in checkpoint.describe()
    assert checkpoint.pad == read_stable_diffusion(tmp_path / "source").pad


def test_prediction_of_a_published_file_can_be_given(tmp_path: Path) -> None:
    path = single_file(tmp_path / "file.safetensors", "2.x")
    checkpoint = read_stable_diffusion(path, prediction="v")
    assert checkpoint.architecture.prediction == "v"
    assert "predicts v;" in checkpoint.describe()


def test_description_of_a_folder(tmp_path: Path) -> None:
    assert read_stable_diffusion(folder(tmp_path, "2.x")).describe() == (
        "Stable Diffusion 2.x, 4 million weights, float32: UNet with 4 input channels, predicts the noise; "
        "text encoder openclip of 2 layers, 64 wide; with its tokenizer"
    )


def test_last_layer_of_openclip_is_left_out_where_it_is_stored() -> None:
    shapes = {
        "cond_stage_model.model.token_embedding.weight": (49408, 1024),
        "cond_stage_model.model.positional_embedding": (77, 1024),
        "cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight": (4096, 1024),
        "first_stage_model.post_quant_conv.weight": (4, 4, 1, 1),
        "first_stage_model.encoder.down.0.block.0.conv1.weight": (128, 128, 3, 3),
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.0.out_layers.3.weight": (320, 320, 3, 3),
        "model.diffusion_model.middle_block.1.proj_in.weight": (320, 320),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
    }
    for last in (22, 23):
        block = {f"cond_stage_model.model.transformer.resblocks.{last}.ln_1.weight": (1024,)}
        assert infer_stable_diffusion(shapes | block, {}).text_layers == 23


def test_dinov2_and_openclip_are_told_apart(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert any(key.startswith("cond_stage_model.model.") for key in load_file(tiny_checkpoint))
    assert not is_stable_diffusion(tiny_checkpoint)
    assert is_stable_diffusion(single_file(tmp_path / "file.safetensors", "2.x"))
    assert is_stable_diffusion(tmp_path / "source")


# --- weights ----------------------------------------------------------------------------------------------


@both_versions
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variant": "fp16"},
        {"max_shard_size": "1MB"},
        {"max_shard_size": "1MB", "variant": "fp16"},
    ],
    ids=["whole", "variant", "shards", "shards of a variant"],
)
def test_weights_of_a_folder(tmp_path: Path, version: Version, options: dict[str, str]) -> None:
    checkpoint = read_stable_diffusion(folder(tmp_path, version, **options))
    assert_same_weights(checkpoint, weights(pipeline(version)))


def test_plain_weights_are_taken_unless_a_variant_is_named(tmp_path: Path) -> None:
    folder(tmp_path)
    for path in [
        *tmp_path.rglob("model.safetensors"),
        *tmp_path.rglob("diffusion_pytorch_model.safetensors"),
    ]:
        for name in ("fp16", "bf16"):
            dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[name]
            halved = {key: tensor.to(dtype) for key, tensor in load_file(path).items()}
            save_file(halved, path.with_name(f"{path.stem}.{name}.safetensors"))
    assert read_stable_diffusion(tmp_path).dtype == torch.float32
    assert read_stable_diffusion(tmp_path, variant="bf16").dtype == torch.bfloat16
    next(tmp_path.rglob("unet/diffusion_pytorch_model.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"unet' has no .*: choose one of the variants bf16, fp16"):
        read_stable_diffusion(tmp_path)
    with pytest.raises(CheckpointError, match="no weights of the variant 'ema'"):
        read_stable_diffusion(tmp_path, variant="ema")


def test_folder_of_older_libraries(tmp_path: Path) -> None:
    """Fewer settings, pickled weights, a prefix in the text encoder, other names in the VAE's attention."""
    folder(tmp_path)
    for name in ("norm_num_groups", "scaling_factor", "mid_block_add_attention"):
        change_json(tmp_path / "vae" / "config.json", lambda content, name=name: content.pop(name))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for part, stem in [("vae", "diffusion_pytorch_model"), ("text_encoder", "model")]:
        path = tmp_path / part / f"{stem}.safetensors"
        tensors = load_file(path)
        if part == "vae":
            pattern = r"(?<=attentions\.0\.)(to_q|to_k|to_v|to_out\.0)"
            tensors = {re.sub(pattern, lambda m: old[m[0]], key): tensor for key, tensor in tensors.items()}
            assert "decoder.mid_block.attentions.0.proj_attn.bias" in tensors
        else:
            tensors = {f"text_model.{key}": tensor for key, tensor in tensors.items()}
            tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        path.unlink()
        torch.save(tensors, tmp_path / part / f"{stem.replace('model', 'pytorch_model', part != 'vae')}.bin")
    assert_same_weights(read_stable_diffusion(tmp_path), weights(pipeline("1.x")))


@both_versions
def test_diffusers_reads_the_same_weights_from_our_single_file(tmp_path: Path, version: Version) -> None:
    """So the names in the original layout are right."""
    path = single_file(tmp_path / "file.safetensors", version)
    kind = type(pipeline(version))
    theirs = kind.from_single_file(str(path), config=str(tmp_path / "source"), local_files_only=True)
    assert_same_weights(read_stable_diffusion(path), weights(theirs))


@both_versions
def test_single_file_to_folder_and_back(tmp_path: Path, version: Version) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    write_single_file(first, read_stable_diffusion(folder(tmp_path / "source", version)))
    write_folder(tmp_path / "folder", read_stable_diffusion(first))
    write_single_file(second, read_stable_diffusion(tmp_path / "folder"))
    assert read_tensors(first).metadata == read_tensors(second).metadata
    before, after = load_file(first), load_file(second)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_size_of_the_pictures_is_that_of_the_latent_in_a_folder(tmp_path: Path) -> None:
    checkpoint = read_stable_diffusion(folder(tmp_path / "source"))
    assert checkpoint.size == (128, 128)  # the pipeline's sample_size of 64, times 2
    write_folder(tmp_path / "small", replace(checkpoint, size=(32, 32)))
    assert '"sample_size": 16' in (tmp_path / "small/unet/config.json").read_text()
    write_single_file(tmp_path / "small.safetensors", read_stable_diffusion(tmp_path / "small"))
    assert read_stable_diffusion(tmp_path / "small.safetensors").size == (32, 32)
    write_folder(tmp_path / "wide", replace(checkpoint, size=(32, 48)))
    assert read_stable_diffusion(tmp_path / "wide").size == (32, 48)


@pytest.mark.parametrize("stored", [0, "64", 64.5, True, [64], [64, 0]])
def test_a_sample_size_that_is_none_is_refused(tmp_path: Path, stored: object) -> None:
    change_json(folder(tmp_path) / "unet/config.json", lambda unet: unet.update(sample_size=stored))
    with pytest.raises(CheckpointError, match="is not the size of a latent"):
        read_stable_diffusion(tmp_path)


def test_single_file_in_half_precision_stays_bit_for_bit(tmp_path: Path) -> None:
    path = single_file(tmp_path / "file.safetensors", "2.x")
    halved = {k: t.half() if t.is_floating_point() else t for k, t in load_file(path).items()}
    save_file(halved, path)
    write_folder(tmp_path / "folder", read_stable_diffusion(path))
    write_single_file(tmp_path / "again.safetensors", read_stable_diffusion(tmp_path / "folder"))
    again = load_file(tmp_path / "again.safetensors")
    for key in again:
        if key.startswith(("model.", "first_stage_model.", "cond_stage_model.")):
            assert torch.equal(again[key], halved[key]), key


@every_kind
def test_diffusers_opens_our_folder(
    tmp_path: Path, version: Version, inpaint: bool, prediction_type: str
) -> None:
    original = pipeline(version, inpaint, prediction_type)
    original.save_pretrained(tmp_path / "source")
    write_folder(tmp_path / "ours", read_stable_diffusion(tmp_path / "source"))
    opened = DiffusionPipeline.from_pretrained(tmp_path / "ours", local_files_only=True)
    assert type(opened) is type(original)
    assert opened.scheduler.config.prediction_type == prediction_type
    for part, tensors in weights(original).items():
        assert all(torch.equal(tensors[name], tensor) for name, tensor in weights(opened)[part].items())
    prompt = "a Cat! <|ENDOFTEXT|> in the <|startoftext|> snow"
    assert opened.tokenizer(prompt)["input_ids"] == original.tokenizer(prompt)["input_ids"]


@both_versions
def test_lightning_checkpoint(tmp_path: Path, version: Version) -> None:
    tensors = load_file(single_file(tmp_path / "file.safetensors", version))
    torch.save({"state_dict": tensors, "global_step": 470_000}, tmp_path / "file.ckpt")
    checkpoint = read_stable_diffusion(tmp_path / "file.ckpt")
    assert_same_weights(checkpoint, weights(pipeline(version)))
    write_folder(tmp_path / "folder", checkpoint)
    assert_same_weights(read_stable_diffusion(tmp_path / "folder"), weights(pipeline(version)))


@torch.no_grad()
def test_parts_compute_what_those_of_the_pipeline_do(tmp_path: Path) -> None:
    original = pipeline("2.x", inpaint=True)
    original.save_pretrained(tmp_path)
    checkpoint = read_stable_diffusion(tmp_path)
    ids = torch.arange(77)[None]
    tokens = checkpoint.load_part("text_encoder")(ids).last_hidden_state
    assert torch.equal(tokens, original.text_encoder.eval()(ids).last_hidden_state)
    latent = torch.randn(1, 9, 8, 8)
    noise = checkpoint.load_part("unet")(latent, 500, tokens).sample
    assert torch.equal(noise, original.unet.eval()(latent, 500, tokens).sample)
