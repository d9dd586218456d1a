"""Networks from what was trained before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from tests.support.tiny import TINY
from training.assemble import frozen_parts
from training.config import Recipe
from training.network.architecture import infer_architecture
from training.network.checkpoint import write_model
from training.network.modules import AnyDoor


def test_a_checkpoint_starts_the_next_run(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, path = AnyDoor(TINY), tmp_path / "model.safetensors"
    write_model(path, model, torch.float32)
    started = frozen_parts(replace(Recipe(architecture=TINY), start=str(path)), tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(started.state_dict()[name], value), name
    shapes = {name: tuple(tensor.shape) for name, tensor in model.official_state_dict().items()}
    inferred = infer_architecture(shapes, unet_head_width=32, dino_heads=1, unet_norm_groups=8)
    assert inferred == TINY
