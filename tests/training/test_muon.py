"""Muon: against singular values, PyTorch's own on matrices, and AdamW on everything else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from runtime.errors import InputError
from tests.support.launch import finish, start_two
from tests.support.tiny import TINY, RandomPairs, open_zero_convolutions
from training.loop import train
from training.loop_settings import LoopSettings
from training.muon import MuonAdamW, hidden_matrices, orthogonalise
from training.network.modules import AnyDoor
from training.network.segmenter import Segmenter, SegmenterArchitecture
from training.systems.anydoor import Denoising, DiffusionTask


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(0, 1000))
def test_singular_values_become_about_one(count: int, rows: int, columns: int, seed: int) -> None:
    """Singular vectors stay; directions that are a hundred times weaker count as much as the others."""
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(count, rows, columns, generator=generator)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    values = torch.logspace(0, -1.5, values.shape[1]).expand_as(values)
    found = orthogonalise(left * values[:, None] @ right)
    core = left.mT @ found @ right.mT
    torch.testing.assert_close(left @ core @ right, found, rtol=0, atol=0.05)
    assert core.diagonal(dim1=1, dim2=2).sub(0.93).abs().max() < 0.35
    off = core - torch.diag_embed(core.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < 0.15


def test_a_matrix_without_gradient_stays() -> None:
    assert not orthogonalise(torch.zeros(2, 3, 4)).any()


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "conv_in": nn.Conv2d(3, 8, 3),
            "wide": nn.Linear(8, 24),
            "tall": nn.Linear(24, 8),
            "also_wide": nn.Linear(8, 24),
            "conv": nn.Conv2d(8, 16, 3),
            "norm": nn.GroupNorm(4, 16),
        }
    )


def give_gradients(weights: Iterable[Tensor], step: int) -> None:
    for number, weight in enumerate(weights):
        generator = torch.Generator().manual_seed(100 * step + number)
        weight.grad = torch.randn(weight.shape, generator=generator)


def test_hidden_layers_are_those_between_the_ends() -> None:
    named = dict(layers().named_parameters())
    found = {id(weight) for weight in hidden_matrices(named.items())}
    hidden = {"wide.weight", "tall.weight", "also_wide.weight", "conv.weight"}
    assert {name for name, weight in named.items() if id(weight) in found} == hidden


def test_the_ends_of_the_segmenter_are_no_hidden_layers() -> None:
    named = dict(Segmenter(SegmenterArchitecture()).named_parameters())
    found = {id(weight) for weight in hidden_matrices(named.items())}
    rest = {name for name, weight in named.items() if weight.ndim > 1 and id(weight) not in found}
    assert rest == {"enter.weight", "leave.weight"}


def test_matrices_are_stepped_as_by_pytorch_s_muon() -> None:
    """A convolution as the matrix of its outputs, matrices of one shape together."""
    ours, theirs = layers(), layers()
    matrices = hidden_matrices(ours.named_parameters())
    ours_steps = MuonAdamW(ours.parameters(), matrices, lr=1e-2, weight_decay=0.1)
    flat = [nn.Parameter(w.detach().flatten(1)) for w in hidden_matrices(theirs.named_parameters())]
    theirs_steps = torch.optim.Muon(flat, 1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        give_gradients(matrices, step)
        give_gradients(flat, step)
        for weight, twin in zip(matrices, flat, strict=True):
            assert weight.grad is not None
            twin.grad = weight.grad.flatten(1)
        ours_steps.step()
        theirs_steps.step()
    for weight, twin in zip(matrices, flat, strict=True):
        # both compute in bfloat16, in another order
        torch.testing.assert_close(weight.flatten(1), twin, rtol=0, atol=6e-4)


def test_everything_else_is_stepped_as_by_adamw() -> None:
    ours, theirs = layers(), layers()
    matrices = hidden_matrices(ours.named_parameters())
    rest = {n for n, w in ours.named_parameters() if not any(w is matrix for matrix in matrices)}
    ours_steps = MuonAdamW(ours.parameters(), matrices, lr=1e-2)
    theirs_steps = torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    for step in range(3):
        give_gradients(ours.parameters(), step)
        give_gradients(theirs.parameters(), step)
        ours_steps.step()
        theirs_steps.step()
    twins = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        assert torch.equal(weight, twins[name]) == (name in rest), name


def test_a_rate_can_be_a_tensor() -> None:
    """As on a card, where a captured step reads it anew each time."""
    stepped = []
    for rate in (1e-2, torch.tensor(1e-2)):
        network = layers()
        matrices = hidden_matrices(network.named_parameters())
        steps = MuonAdamW([{"params": network.parameters(), "lr": rate}], matrices, foreach=False)
        give_gradients(network.parameters(), 0)
        steps.step()
        stepped.append(list(network.parameters()))
    for number, tensor in zip(*stepped, strict=True):
        torch.testing.assert_close(tensor, number)


def test_without_matrices_it_is_adamw() -> None:
    ours, theirs = layers(), layers()
    for network, steps in (
        (ours, MuonAdamW(ours.parameters(), [], lr=1e-2)),
        (theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2)),
    ):
        give_gradients(network.parameters(), 0)
        steps.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def task() -> DiffusionTask:
    torch.manual_seed(0)
    model = AnyDoor(TINY)
    open_zero_convolutions(model)
    return DiffusionTask(model, RandomPairs(), Denoising(unet_encoder=True))


def loop(steps: int, batch: int = 2, **changes: Any) -> LoopSettings:
    return LoopSettings(steps, batch, learning_rate=1e-3, optimizer="muon", save_every=2, **changes)


def weights(folder: Path, file: str = "mean.pt") -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(folder / file, weights_only=True)
    return found


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    train(task(), loop(4, ema=0.9), tmp_path / "whole")
    for steps in (2, 4):
        train(task(), loop(steps, ema=0.9), tmp_path / "parts")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], value) for name, value in parts.items())


def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    train(task(), loop(3, 4), tmp_path / "alone")
    finish(*start_two(train_by_muon, tmp_path / "two"))
    alone, two = weights(tmp_path / "alone"), weights(tmp_path / "two")
    differences = torch.cat([(alone[name] - value).abs().flatten() for name, value in two.items()])
    # rounding decides where a gradient is next to nothing
    assert differences.gt(5e-4).float().mean() < 1e-3


def train_by_muon(folder: Path) -> None:
    train(task(), loop(3, 2), folder)


def test_sharded_weights_are_refused() -> None:
    with pytest.raises(InputError, match="optimizer 'muon' needs whole matrices"):
        LoopSettings(1, optimizer="muon", shard=True)


def test_half_precision_is_refused() -> None:
    with pytest.raises(InputError, match="optimizer 'muon' is not for precision 'fp16'"):
        LoopSettings(1, optimizer="muon", precision="fp16")


@pytest.mark.parametrize("optimizers", [("adamw", "muon"), ("muon", "adamw")])
def test_a_run_does_not_go_on_with_another_optimizer(optimizers: tuple[Any, Any], tmp_path: Path) -> None:
    first, second = (
        replace(loop(steps), optimizer=name) for steps, name in zip((1, 2), optimizers, strict=True)
    )
    train(task(), first, tmp_path / "stage")
    with pytest.raises(InputError, match=r"'.*last\.pt' does not fit what the recipe describes"):
        train(task(), second, tmp_path / "stage")
