"""Networks from what was trained before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.imprint import TINY_IMPRINT
from tests.support.tiny import TINY
from training.assemble import frozen_parts
from training.assemble_imprint import start_model
from training.config import ImprintRecipe, Recipe
from training.network.architecture import infer_architecture
from training.network.checkpoint import write_model
from training.network.checkpoint_file import CheckpointError
from training.network.modules import AnyDoor

Saved = tuple[AnyDoor, Path]
"""A network, and the checkpoint that has its weights."""


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    torch.manual_seed(1)
    model, path = AnyDoor(TINY), tmp_path / "model.safetensors"
    write_model(path, model, torch.float32)
    return model, path


def test_a_checkpoint_starts_the_next_run(tmp_path: Path, saved: Saved) -> None:
    model, path = saved
    started = frozen_parts(replace(Recipe(architecture=TINY), start=str(path)), tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(started.state_dict()[name], value), name
    shapes = {name: tuple(tensor.shape) for name, tensor in model.official_state_dict().items()}
    inferred = infer_architecture(shapes, unet_head_width=32, dino_heads=1, unet_norm_groups=8)
    assert inferred == TINY


def test_encoders_come_from_another_checkpoint(tmp_path: Path, saved: Saved) -> None:
    model, path = saved
    recipe = ImprintRecipe(architecture=TINY_IMPRINT, encoders=str(path))
    started = start_model(recipe, tmp_path)
    for part, taken in (("vae", model.vae), ("id_encoder.backbone", model.id_encoder.backbone)):
        found = started.get_submodule(part).state_dict()
        assert all(torch.equal(found[name], value) for name, value in taken.state_dict().items()), part


def test_a_wider_unet_starts_with_the_encoders_and_the_hint_block_of_another_checkpoint(
    tmp_path: Path, saved: Saved
) -> None:
    model, path = saved
    wider = replace(TINY, unet_channels=tuple(2 * width for width in TINY.unet_channels))
    started = frozen_parts(Recipe(architecture=wider, encoders=str(path)), tmp_path)
    block = "control.controlnet_cond_embedding"
    for part in ("vae", "id_encoder.dino", f"{block}.conv_in", f"{block}.blocks"):
        found = started.get_submodule(part).state_dict()
        taken = model.get_submodule(part).state_dict()
        assert all(torch.equal(found[name], value) for name, value in taken.items()), part
    widths = [part.get_submodule(block).conv_out.out_channels for part in (started, model)]
    assert widths[0] == 2 * widths[1]


def test_encoders_of_other_sizes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_model(path, AnyDoor(replace(TINY, dino_depth=2)), torch.float32)
    with pytest.raises(CheckpointError, match=r"other sizes than the recipe's"):
        start_model(ImprintRecipe(architecture=TINY_IMPRINT, encoders=str(path)), tmp_path)


@torch.no_grad()
def test_a_unet_of_anydoor_ignores_the_scene_at_first_and_the_adapter_is_its_projector(
    tmp_path: Path, saved: Saved
) -> None:
    model, path = saved
    recipe = ImprintRecipe(architecture=TINY_IMPRINT, encoders=str(path), unet=str(path))
    started = start_model(recipe, tmp_path)
    latent, timestep, tokens = (
        torch.randn(2, 4, 8, 8),
        torch.tensor([3, 700]),
        torch.randn(2, 5, TINY.token_width),
    )
    alone = model.unet(latent, timestep, encoder_hidden_states=tokens, return_dict=False)[0]
    for scene in (torch.zeros(2, 5, 8, 8), torch.randn(2, 5, 8, 8)):
        seen = started.unet(
            torch.cat([latent, scene], 1), timestep, encoder_hidden_states=tokens, return_dict=False
        )[0]
        assert torch.allclose(seen, alone, atol=1e-6)
    features = torch.randn(2, 5, TINY.dino_width)
    adapter, projector = started.id_encoder.projector, model.id_encoder.projector
    assert adapter.layers > 0
    assert torch.allclose(adapter(features), projector(adapter.norm(features)), atol=1e-6)


def test_a_unet_of_other_sizes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_model(path, AnyDoor(replace(TINY, unet_layers=2)), torch.float32)
    recipe = ImprintRecipe(architecture=TINY_IMPRINT, encoders=str(path), unet=str(path))
    with pytest.raises(CheckpointError, match=r"the UNet of .* has other sizes than the recipe's"):
        start_model(recipe, tmp_path)
