"""IMPRINT's network: its adapter against Paint-by-Example's, what its UNet sees, and its checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.pipelines.deprecated.paint_by_example.image_encoder import PaintByExampleImageEncoder
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig

from tests.support.imprint import (
    TINY_IMPRINT,
    TINY_OBJECT_STITCH,
    imprint_file,
    object_stitch_file,
    object_stitch_tensors,
    tiny_imprint,
)
from training.network.adapter import ContentAdapter
from training.network.architecture import ArchitectureError
from training.network.checkpoint import (
    CheckpointError,
    read_checkpoint,
    read_start,
    write_checkpoint,
    write_model,
)
from training.network.imprint import CLIPEncoder, Imprint, ImprintArchitecture, infer_imprint, is_imprint
from training.network.official_keys import SCHEDULE_KEYS
from training.network.stable_diffusion_checkpoint import is_stable_diffusion


def random_weights(module: nn.Module, seed: int = 0) -> None:
    """Also of the layers that start as ones and zeros."""
    torch.manual_seed(seed)
    for weight in module.parameters():
        nn.init.normal_(weight, std=0.2)


# --- the adapter ------------------------------------------------------------------------------------------


def from_diffusers(encoder: PaintByExampleImageEncoder) -> dict[str, Tensor]:
    """The weights of its mapper, norm and projection under our names."""
    state, found = encoder.state_dict(), {}
    places = {
        "norm1": "norm1",
        "norm3": "norm2",
        "attn1.to_out.0": "out",
        "ff.net.0.proj": "mlp.0",
        "ff.net.2": "mlp.2",
    }
    for layer in range(len(encoder.mapper.blocks)):
        block = f"mapper.blocks.{layer}."
        for kind in ("weight", "bias"):
            for theirs, ours in places.items():
                found[f"blocks.{layer}.{ours}.{kind}"] = state[f"{block}{theirs}.{kind}"]
            parts = [state[f"{block}attn1.to_{name}.{kind}"] for name in "qkv"]
            found[f"blocks.{layer}.qkv.{kind}"] = torch.cat(parts)
    for kind in ("weight", "bias"):
        found |= {f"norm.{kind}": state[f"final_layer_norm.{kind}"], kind: state[f"proj_out.{kind}"]}
    return found


@torch.no_grad()
def test_the_adapter_is_paint_by_example_s_mapper() -> None:
    config = CLIPVisionConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=24, num_attention_heads=2
    )
    oracle = PaintByExampleImageEncoder(config, proj_size=20).eval()
    random_weights(oracle)
    assert len(oracle.mapper.blocks) == 5
    adapter = ContentAdapter(48, 20, layers=5)
    adapter.load_state_dict(from_diffusers(oracle))
    tokens = torch.randn(2, 257, 48)
    expected = oracle.proj_out(oracle.final_layer_norm(oracle.mapper(tokens)))
    torch.testing.assert_close(adapter(tokens), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_without_layers_is_a_linear_layer() -> None:
    adapter, tokens = ContentAdapter(12, 8), torch.randn(2, 5, 12)
    assert set(adapter.state_dict()) == {"weight", "bias"}
    assert torch.equal(adapter(tokens), F.linear(tokens, adapter.weight, adapter.bias))


@torch.no_grad()
def test_several_heads_split_the_channels() -> None:
    """Query, key and value of a head lie beside each other, as in the public code."""
    adapter = ContentAdapter(8, 8, layers=1, heads=2)
    random_weights(adapter)
    block, tokens = adapter.blocks[0], torch.randn(1, 5, 8)
    parts = block.qkv(block.norm1(tokens)).chunk(6, dim=-1)  # q, k, v of the first head, then of the second
    heads = [F.scaled_dot_product_attention(*parts[start : start + 3]) for start in (0, 3)]
    middle = tokens + block.out(torch.cat(heads, dim=-1))
    torch.testing.assert_close(block(tokens), middle + block.mlp(block.norm2(middle)))


# --- the UNet's input -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("order", ["mask_latents", "latents_keep"])
def test_the_scene_comes_in_the_order_of_the_checkpoint(order: str) -> None:
    model = tiny_imprint(replace(TINY_IMPRINT, scene_order=order))
    latent, tokens, timestep = torch.randn(2, 4, 4, 4), torch.randn(2, 9, 32), torch.tensor([3, 700])
    mask, scene = (torch.rand(2, 1, 4, 4) > 0.5).float(), torch.randn(2, 4, 4, 4)
    found = model.predict_noise(latent, timestep, tokens, torch.cat([mask, scene], 1))
    parts = [latent, mask, scene] if order == "mask_latents" else [latent, scene, 1 - mask]
    torch.testing.assert_close(found, model.unet(torch.cat(parts, 1), timestep, tokens).sample)


@torch.no_grad()
def test_v_is_turned_into_the_noise() -> None:
    epsilon, v = tiny_imprint(), tiny_imprint(replace(TINY_IMPRINT, prediction="v"))
    latent, tokens, timestep = torch.randn(1, 4, 4, 4), torch.randn(1, 9, 32), torch.tensor([400])
    scene = torch.randn(1, 5, 4, 4)
    signal = epsilon.alphas_cumprod[400]
    output = epsilon.predict_noise(latent, timestep, tokens, scene)
    expected = signal.sqrt() * output + (1 - signal).sqrt() * latent
    torch.testing.assert_close(v.predict_noise(latent, timestep, tokens, scene), expected)


# --- checkpoints ------------------------------------------------------------------------------------------


def test_our_layout_survives_the_network_bit_for_bit(tmp_path: Path) -> None:
    first = imprint_file(tmp_path / "first.safetensors")
    checkpoint = read_checkpoint(first)
    assert checkpoint.architecture == TINY_IMPRINT
    assert checkpoint.system == "imprint"
    assert "IMPRINT" in checkpoint.describe()
    model = Imprint(TINY_IMPRINT)
    model.load_official_state_dict(checkpoint.tensors)
    write_model(tmp_path / "second.safetensors", model)
    one, two = load_file(first), load_file(tmp_path / "second.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not checkpoint.unconditional_tokens.any()
    assert checkpoint.unconditional_tokens.shape == (1, 257, 32)


@torch.no_grad()
def test_parts_are_loaded_alone(tmp_path: Path) -> None:
    model = tiny_imprint()
    checkpoint = read_checkpoint(imprint_file(tmp_path / "a.safetensors", model))
    reference = torch.rand(1, 3, 224, 224)
    alone = checkpoint.load_part("id_encoder")
    assert torch.equal(alone.encode_reference(reference), model.encode_reference(reference))
    assert not hasattr(checkpoint.load_part("unet"), "id_encoder")


def test_the_published_sizes_are_inferred() -> None:
    """Of ObjectStitch, as configs/v1.yaml and the encoder of the public code say, and of our IMPRINT."""
    object_stitch = ImprintArchitecture(
        unet_head_count=8,
        unet_linear_projection=False,
        token_width=768,
        id_backbone="clip",
        dino_width=1024,
        dino_depth=24,
        dino_heads=16,
        dino_grid=16,
        scene_order="latents_keep",
    )
    for architecture in (ImprintArchitecture(), object_stitch):
        with torch.device("meta"):
            shapes = Imprint(architecture).official_shapes()
        assert is_imprint(shapes)
        assert infer_imprint(shapes, {"scene_order": architecture.scene_order}) == architecture
    assert shapes["cond_stage_model.mapper.resblocks.4.attn.c_qkv.weight"] == (3072, 1024)
    assert shapes["model.diffusion_model.input_blocks.0.0.weight"] == (320, 9, 3, 3)
    assert shapes["learnable_vector"] == (1, 1, 768)


KEYS_OF_THE_PUBLIC_CODE = (
    "learnable_vector",
    "proj_out.weight",
    "cond_stage_model.final_ln.bias",
    "cond_stage_model.mapper.resblocks.1.attn.c_qkv.weight",
    "cond_stage_model.mapper.resblocks.1.attn.c_proj.bias",
    "cond_stage_model.mapper.resblocks.1.ln_2.weight",
    "cond_stage_model.mapper.resblocks.1.mlp.c_fc.weight",
    "cond_stage_model.mapper.resblocks.1.mlp.c_proj.weight",
    "cond_stage_model.transformer.vision_model.embeddings.class_embedding",
    "cond_stage_model.transformer.vision_model.pre_layrnorm.weight",
    "cond_stage_model.transformer.vision_model.encoder.layers.1.self_attn.q_proj.weight",
    "cond_stage_model.transformer.vision_model.post_layernorm.weight",
)


@torch.no_grad()
def test_object_stitch_s_layout_is_recognised_by_its_keys(tmp_path: Path) -> None:
    tensors = object_stitch_tensors()
    assert set(KEYS_OF_THE_PUBLIC_CODE) <= set(tensors)
    path = object_stitch_file(tmp_path / "ObjectStitch.pth")
    assert not is_stable_diffusion(path)
    checkpoint = read_checkpoint(path)
    # eight heads per level, of which no level of the small file is as wide as those of the published one
    assert checkpoint.architecture == replace(TINY_OBJECT_STITCH, unet_norm_groups=32, unet_head_width=64)
    assert checkpoint.defaults == {"reference_ratio": 1.0}
    assert torch.equal(checkpoint.unconditional_tokens[0, 256], tensors["learnable_vector"][0, 0])


@torch.no_grad()
def test_object_stitch_s_encoder_is_the_written_out_one(tmp_path: Path) -> None:
    """CLIP's tokens, all of them normalised, then mapper, final_ln and proj_out."""
    t = object_stitch_tensors()
    encoder = read_checkpoint(object_stitch_file(tmp_path / "a.pth")).load_part("id_encoder").id_encoder
    assert isinstance(encoder, CLIPEncoder)
    reference = torch.rand(1, 3, 224, 224)
    mean, std = (
        torch.tensor([0.48145466, 0.4578275, 0.40821073]),
        torch.tensor([0.26862954, 0.26130258, 0.27577711]),
    )
    hidden = encoder.clip((reference - mean.view(3, 1, 1)) / std.view(3, 1, 1)).last_hidden_state

    def norm(x: Tensor, key: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], t[f"{key}.weight"], t[f"{key}.bias"])

    def linear(x: Tensor, key: str) -> Tensor:
        return F.linear(x, t[f"{key}.weight"], t[f"{key}.bias"])

    x = norm(hidden, "cond_stage_model.transformer.vision_model.post_layernorm")
    for block in (f"cond_stage_model.mapper.resblocks.{layer}" for layer in range(2)):
        q, k, v = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_qkv").chunk(3, -1)
        looks = (q @ k.transpose(1, 2) / 8.0).softmax(-1)  # the root of 64 channels
        x = x + linear(looks @ v, f"{block}.attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")), f"{block}.mlp.c_proj")
    expected = linear(norm(x, "cond_stage_model.final_ln"), "proj_out")
    torch.testing.assert_close(encoder(reference), expected, rtol=1e-4, atol=1e-5)


# --- refusals ---------------------------------------------------------------------------------------------


def test_what_is_not_complete_is_named(tmp_path: Path) -> None:
    tensors = object_stitch_tensors()
    del tensors["cond_stage_model.mapper.resblocks.0.mlp.c_fc.bias"]
    torch.save({"state_dict": tensors}, tmp_path / "less.pth")
    with pytest.raises(
        CheckpointError, match=r"not an IMPRINT checkpoint: 1 of .*resblocks\.0\.mlp\.c_fc\.bias"
    ):
        read_checkpoint(tmp_path / "less.pth")


def test_a_start_of_another_system_is_refused(tmp_path: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="is of the system anydoor"):
        read_start(tiny_checkpoint, TINY_IMPRINT)
    path = imprint_file(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter_layers = 1, the recipe's has 5"):
        read_start(path, replace(TINY_IMPRINT, adapter_layers=5))
    assert read_start(path, TINY_IMPRINT).architecture == TINY_IMPRINT


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scene_channels": 0}, "must see the scene"),
        ({"scene_channels": 4}, "takes 8 channels: expected 4, or 9"),
        ({"adapter_heads": 5}, "5 attention heads do not divide the adapter's width, 64"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(change: dict[str, int], says: str) -> None:
    with pytest.raises(ArchitectureError, match=says):
        replace(TINY_IMPRINT, **change)


def test_an_unknown_order_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {
        k: v.contiguous() for k, v in tiny_imprint().official_state_dict().items() if k not in SCHEDULE_KEYS
    }
    save_file(tensors, path, {"anydoor.scene_order": "upside_down"})
    with pytest.raises(CheckpointError, match="'upside_down' of scene_order"):
        read_checkpoint(path)
    write_checkpoint(path, tensors, TINY_IMPRINT)
    assert read_checkpoint(path).architecture == TINY_IMPRINT
