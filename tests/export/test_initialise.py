"""Stable Diffusion and DINOv2 joined to what training starts from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.seeded import TINY
from export.initialise import join_imprint, main
from training.network.checkpoint import CheckpointError, read_checkpoint
from training.network.checkpoint_file import read_tensors
from training.network.imprint import Imprint, ImprintArchitecture
from training.network.modules import AnyDoor

DINO = "cond_stage_model.model."
Tensors = dict[str, Tensor]


@pytest.fixture
def ingredients(tiny_checkpoint: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A plain diffusion checkpoint with a text encoder, and a DINOv2 file."""
    tensors = load_file(tiny_checkpoint)
    diffusion, dino = tmp_path / "sd.safetensors", tmp_path / "dino.pth"
    plain = {k: v for k, v in tensors.items() if k.startswith(("model.", "first_stage_model."))}
    save_file(
        plain | {"cond_stage_model.model.transformer.resblocks.0.ln_1.weight": torch.ones(8)}, diffusion
    )
    torch.save({k.removeprefix(DINO): v for k, v in tensors.items() if k.startswith(DINO)}, dino)
    return diffusion, dino


def test_joined_checkpoint_is_an_anydoor_network_whose_control_changes_nothing(
    ingredients: tuple[Path, Path], tmp_path: Path
) -> None:
    diffusion, dino = ingredients
    output = tmp_path / "init.safetensors"
    heads = ["--unet-head-width", "8", "--dino-heads", "2"]
    arguments = ["--stable-diffusion", str(diffusion), "--dinov2", str(dino), "--output", str(output), *heads]
    assert main(arguments) == 0
    checkpoint = read_checkpoint(output)
    assert checkpoint.architecture == TINY
    key = "input_blocks.1.0.in_layers.2.weight"
    copied, source = (checkpoint.tensors[p + key] for p in ("control_model.", "model.diffusion_model."))
    assert torch.equal(copied, source)

    model = AnyDoor(TINY)
    model.load_official_state_dict(checkpoint.tensors)
    maps = model.detail_maps(torch.randn(1, 4, 64, 64), torch.tensor([501]), torch.randn(1, 257, 32))
    assert all(not m.any() for m in maps)


def test_wrong_ingredient_is_refused_in_one_sentence(
    ingredients: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    diffusion, _ = ingredients
    output = tmp_path / "init.safetensors"
    arguments = ["--stable-diffusion", str(diffusion), "--dinov2", str(diffusion), "--output", str(output)]
    assert main(arguments) == 2
    assert "the DINOv2 checkpoint has no 'cls_token' (its first key is '" in capsys.readouterr().err
    assert not output.exists()


def plain_mlp(dino: Tensors) -> Tensors:
    return {key.replace("w12", "fc1").replace("w3", "fc2"): tensor for key, tensor in dino.items()}


DAMAGE: list[tuple[Callable[[Tensors], Tensors], str]] = [
    (plain_mlp, "its DINOv2 has plain MLPs, as ViT-S, ViT-B and ViT-L do; only SwiGLU, that of ViT-g/14"),
    (lambda dino: {**dino, "cls_token": torch.zeros(())}, "the shapes of its tensors do not make a network"),
    (lambda dino: {**dino, "cls_token": torch.zeros(1, 1, 0)}, "the shapes of its tensors do not make a net"),
    (lambda dino: {**dino, "register_tokens": torch.zeros(1, 4, 32)}, "1 keys are unexpected"),
    (
        lambda dino: {**dino, "blocks.999999.norm1.weight": torch.zeros(32)},
        "has the number 999999: none goes so far",
    ),
    (lambda dino: {k: v for k, v in dino.items() if k != "norm.weight"}, "keys are missing ('cond_stage_"),
]


@pytest.mark.parametrize("system", ["anydoor", "imprint"])
@pytest.mark.parametrize(("damage", "sentence"), DAMAGE)
def test_a_dinov2_that_does_not_fit_is_refused_in_one_sentence(
    ingredients: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    system: str,
    damage: Callable[[Tensors], Tensors],
    sentence: str,
) -> None:
    diffusion, dino = ingredients
    damaged = tmp_path / "damaged.pth"
    torch.save(damage(dict(read_tensors(dino).tensors)), damaged)
    output = tmp_path / "init.safetensors"
    files = ["--stable-diffusion", str(diffusion), "--dinov2", str(damaged), "--output", str(output)]
    assert main(["--system", system, *files, "--unet-head-width", "8", "--dino-heads", "2"]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert "It looks like" not in said
    assert not output.exists()


# --- IMPRINT ----------------------------------------------------------------------------------------------


def test_imprint_starts_with_an_unet_that_ignores_the_scene(
    ingredients: tuple[Path, Path], tmp_path: Path
) -> None:
    """Where it inherits a UNet that has never seen one."""
    diffusion, dino = ingredients
    output = tmp_path / "init.safetensors"
    heads = ["--unet-head-width", "8", "--dino-heads", "2"]
    files = ["--stable-diffusion", str(diffusion), "--dinov2", str(dino), "--output", str(output)]
    assert main(["--system", "imprint", *files, *heads]) == 0
    checkpoint = read_checkpoint(output)
    architecture = checkpoint.architecture
    assert isinstance(architecture, ImprintArchitecture)
    assert architecture.adapter_layers == 5
    model = Imprint(architecture)
    model.load_official_state_dict(checkpoint.tensors)
    latent, tokens, timestep = torch.randn(1, 4, 8, 8), torch.randn(1, 9, 32), torch.tensor([501])
    scenes = [torch.randn(1, 5, 8, 8) for _ in range(2)]
    with torch.no_grad():
        one, other = (model.predict_noise(latent, timestep, tokens, scene) for scene in scenes)
    torch.testing.assert_close(one, other)


def test_imprint_inherits_the_unet_of_an_inpainting_model(
    ingredients: tuple[Path, Path], tmp_path: Path
) -> None:
    tensors = dict(read_tensors(ingredients[0]).tensors)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    tensors[key] = torch.randn(tensors[key].shape[0], 9, 3, 3)
    joined, _ = join_imprint(tensors, read_tensors(ingredients[1]).tensors, unet_head_width=8, dino_heads=2)
    assert torch.equal(joined[key], tensors[key])
    tensors[key] = torch.randn(tensors[key].shape[0], 8, 3, 3)
    with pytest.raises(CheckpointError, match="do not make an IMPRINT network: its UNet takes 8 channels"):
        join_imprint(tensors, read_tensors(ingredients[1]).tensors, unet_head_width=8, dino_heads=2)
