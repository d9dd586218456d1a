"""IMPRINT's stages: one step against a hand-written one, what does not move, what the loss does not see."""

from __future__ import annotations

import itertools
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from runtime.errors import InputError
from tests.support.imprint import TINY_IMPRINT, tiny_imprint
from training.loop import train
from training.loop_settings import LoopSettings
from training.small.attention_guide import AttentionGuide
from training.systems.imprint import (
    CompositingSettings,
    ImprintTask,
    StageSettings,
    ViewsSettings,
    load_parts,
    masked_error,
)

SIDE = 32


class RandomSamples:
    """Samples that are not encoded and follow from their number; every third has no reference."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        rng = np.random.default_rng(number)
        mask = np.zeros((1, SIDE, SIDE), np.float32)
        mask[:, 8:, :16] = 1
        return {
            "reference": rng.random((3, 224, 224), np.float32),
            "picture": rng.uniform(-1, 1, (3, SIDE, SIDE)).astype(np.float32),
            "mask": mask,
            "counts": mask * (np.arange(SIDE) < 24)[:, None].astype(np.float32),
            "dropped": np.float32(number % 3 == 2),
            "timestep": int(rng.integers(1000)),
            "noise": rng.standard_normal((4, 4, 4), np.float32),
            "posterior_noise": rng.standard_normal((4, 4, 4), np.float32),
        }


def views(**changes: Any) -> ViewsSettings:
    return ViewsSettings(**{"steps": 1, "batch": 2, "save_every": 1, "log_every": 1, **changes})


def compositing(**changes: Any) -> CompositingSettings:
    return CompositingSettings(**{"steps": 1, "batch": 2, "save_every": 1, "log_every": 1, **changes})


def task_of(settings: StageSettings, **architecture: Any) -> ImprintTask:
    return ImprintTask(tiny_imprint(replace(TINY_IMPRINT, **architecture)), RandomSamples(), settings)


def batch_of(*numbers: int) -> dict[str, Tensor]:
    samples = [RandomSamples()[number] for number in numbers]
    return {k: torch.stack([torch.as_tensor(s[k]) for s in samples]) for k in samples[0]}


def written_out_loss(
    task: ImprintTask | SimpleNamespace, batch: dict[str, Tensor], masked: bool = True
) -> Tensor:
    """From the formulas alone: latents, scene, noise, tokens, and the masked mean."""
    model, count = task.network, len(batch["noise"])
    with torch.no_grad():
        posterior = model.vae.encode(batch["picture"]).latent_dist
        latents = 0.18215 * (posterior.mean + posterior.std * batch["posterior_noise"])
        scene = 0.18215 * model.vae.encode(batch["picture"] * (1 - batch["mask"])).latent_dist.mean
    mask, counts = (
        batch[name][:, :, ::8, ::8] for name in ("mask", "counts")
    )  # nearest: the upper left pixel
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    signal = torch.cumprod(1 - betas, 0).float()[batch["timestep"]].view(count, 1, 1, 1)
    noisy = signal.sqrt() * latents + (1 - signal).sqrt() * batch["noise"]
    tokens = model.id_encoder(batch["reference"]) * (1 - batch["dropped"]).view(-1, 1, 1)
    estimate = model.unet(torch.cat([noisy, mask, scene], 1), batch["timestep"], tokens).sample
    squares = (estimate - batch["noise"]) ** 2
    if not masked:
        return squares.mean()
    losses = [(squares[n] * counts[n]).sum() / (4 * counts[n].sum()) for n in range(count)]
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        (views(rates={"backbone": 1e-4, "adapter": 1e-3, "unet": 2e-3}), {"backbone": 1e-4, "adapter": 1e-3}),
        (compositing(rates={"adapter": 1e-3, "unet": 2e-3}), {"adapter": 1e-3}),
    ],
    ids=["views", "compositing"],
)
def test_one_step_is_the_written_out_step(
    settings: StageSettings, rates: dict[str, float], tmp_path: Path
) -> None:
    """Masked mean squared error, gradient clipping and AdamW with a rate per part, all by hand."""
    task, twin = task_of(settings), task_of(settings)
    train(task, settings, tmp_path)
    written_out_loss(twin, batch_of(0, 1)).backward()  # type: ignore[no-untyped-call]
    learned = {n: p for n, p in twin.module.named_parameters() if p.requires_grad}
    norm = torch.sqrt(sum((p.grad**2).sum() for p in learned.values()))  # type: ignore[arg-type,misc,union-attr]
    after = task.module.state_dict()
    for name, weight in learned.items():
        rate = rates.get(name.split(".")[0], 2e-3)
        gradient = weight.grad * torch.clamp(1.0 / (norm + 1e-6), max=1.0)  # type: ignore[operator]
        expected = weight * (1 - rate * 0.01) - rate * gradient / (gradient.abs() + 1e-8)
        # AdamW's first step is the gradient's sign: rounding decides it where the gradient is next to nothing
        off = (after[name] - expected).abs().gt(2e-5 + 1e-4 * expected.abs())
        assert not (off & gradient.abs().gt(1e-7)).any(), name


@pytest.mark.parametrize("masked", [True, False])
def test_the_loss_is_the_written_out_one(masked: bool) -> None:
    task = task_of(compositing(masked_loss=masked))
    batch = batch_of(0, 2)  # the second has no reference
    loss = task.loss(task.module, batch)["loss"]
    torch.testing.assert_close(loss, written_out_loss(task, batch, masked))


@pytest.mark.parametrize("heads", [1, 4])
def test_the_guide_is_that_of_as_many_heads(heads: int) -> None:
    settings = compositing(attention_guide=0.5, guided_heads=heads)
    task, batch = task_of(settings, unet_head_width=16), batch_of(0, 1)
    batch["places"] = 16 * torch.rand(2, 4, 4, 2, generator=torch.Generator().manual_seed(0))
    losses = task.loss(task.module, batch)

    twin = task_of(settings, unet_head_width=16).network
    guide = AttentionGuide([twin.unet], heads)
    written_out = written_out_loss(SimpleNamespace(network=twin), batch)
    expected = written_out + 0.5 * guide.loss(batch["places"])
    torch.testing.assert_close(losses["loss"], expected)
    assert all(looks.shape[1] == heads for looks in guide.seen.values())


def test_the_loss_of_v_is_its_mean_squared_error() -> None:
    """An error of the noise is the root of the signal times the error of v."""
    task, batch = task_of(compositing(), prediction="v"), batch_of(3)
    signal = task.network.alphas_cumprod[batch["timestep"]]
    losses = task.loss(task.module, batch)
    torch.testing.assert_close(losses["loss"], losses["noise"] / signal[0])


@pytest.mark.parametrize(
    ("settings", "moving"),
    [
        (
            views(steps=2),
            ("backbone.", "adapter.", "unet.up_blocks.", "unet.conv_norm_out.", "unet.conv_out."),
        ),
        (compositing(steps=2), ("adapter.", "unet.")),
        (
            compositing(steps=2, backbone=True, rates={"backbone": 1e-3}, swap=1.0),
            ("backbone.", "adapter.", "unet."),
        ),
    ],
    ids=["views", "compositing", "with the backbone"],
)
def test_what_is_frozen_does_not_move_by_a_bit(
    settings: StageSettings, moving: tuple[str, ...], tmp_path: Path
) -> None:
    task = task_of(settings)
    parts = {"backbone": task.network.id_encoder.backbone, "vae": task.network.vae}
    parts |= {"adapter": task.network.id_encoder.projector, "unet": task.network.unet}
    before = {f"{p}.{n}": w.clone() for p, module in parts.items() for n, w in module.state_dict().items()}
    train(task, settings, tmp_path)
    after = {f"{p}.{n}": w for p, module in parts.items() for n, w in module.state_dict().items()}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(name.startswith(moving) for name in moved)
    assert not any(name.endswith("mask_token") for name in moved)
    for prefix in moving:
        assert any(name.startswith(prefix) for name in moved), prefix


def test_nothing_is_learned_outside_of_the_mask() -> None:
    estimate = torch.randn(2, 4, 6, 6, requires_grad=True)
    counts = (torch.rand(2, 1, 6, 6) > 0.5).float()
    masked_error((estimate - torch.randn(2, 4, 6, 6)).square(), counts).mean().backward()  # type: ignore[no-untyped-call]
    assert estimate.grad is not None
    inside = counts.expand(-1, 4, -1, -1).bool()
    assert not estimate.grad[~inside].any()
    assert estimate.grad[inside].all()


def test_a_small_mask_counts_as_much_as_a_large_one() -> None:
    counts = torch.zeros(3, 1, 8, 8)
    counts[0, 0, 0, 0] = counts[1, 0, :6] = 1
    error = torch.full((3, 4, 8, 8), 2.5)
    assert masked_error(error, counts).tolist() == [2.5, 2.5, 0.0]  # the last one has nothing to draw


def test_without_a_reference_tokens_are_zero() -> None:
    task = task_of(compositing())
    tokens = []
    task.module.unet.register_forward_pre_hook(
        lambda _, __, named: tokens.append(named["encoder_hidden_states"]), with_kwargs=True
    )
    task.loss(task.module, batch_of(1, 2))
    assert tokens[0][0].any()
    assert not tokens[0][1].any()


# --- rates ------------------------------------------------------------------------------------------------


def test_two_parts_exchange_their_rates() -> None:
    settings = LoopSettings(10, rates={"adapter": 4e-5, "unet": 4e-6}, swap=0.5)
    assert [settings.part_rate("adapter", step) for step in (0, 4, 5, 9)] == [4e-5, 4e-5, 4e-6, 4e-6]
    assert [settings.part_rate("unet", step) for step in (0, 4, 5, 9)] == [4e-6, 4e-6, 4e-5, 4e-5]
    assert settings.part_rate("", 7) == settings.learning_rate


def test_the_loop_trains_each_part_at_its_rate(tmp_path: Path) -> None:
    """A part with rate 0 stays until the rates are exchanged; then the other one stays."""
    settings = compositing(steps=4, rates={"adapter": 1e-3, "unet": 0.0}, swap=0.5)
    task, states = task_of(settings), []
    task.module.register_forward_pre_hook(
        lambda module, _: states.append({n: w.detach().clone() for n, w in module.named_parameters()})
    )
    train(task, settings, tmp_path)
    states.append(dict(task.module.named_parameters()))

    def moved(before: int, part: str) -> bool:
        names = [name for name in states[0] if name.startswith(part)]
        return any(not torch.equal(states[before][name], states[before + 1][name]) for name in names)

    assert [moved(step, "adapter.") for step in range(4)] == [True, True, False, False]
    assert [moved(step, "unet.") for step in range(4)] == [False, False, True, True]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"swap": 0.5}, "swap is 0.5 with 0 rates"),
        ({"swap": 0.0, "rates": {"a": 1.0, "b": 2.0}}, "swap is 0 with 2 rates"),
        ({"swap": 0.5, "rates": {"a": 1.0, "b": 2.0, "c": 3.0}}, "two rates to exchange"),
    ],
)
def test_an_exchange_that_makes_no_sense_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        LoopSettings(10, **changes)


def test_a_rate_of_a_part_that_does_not_learn_is_refused(tmp_path: Path) -> None:
    settings = compositing(rates={"backbone": 1e-4}, swap=1.0)
    with pytest.raises(InputError, match=r"rates has 'backbone', which does not learn.*: adapter, unet"):
        train(task_of(settings), settings, tmp_path)


# --- from stage to stage ----------------------------------------------------------------------------------


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    """Over the exchange of rates, too: the moments of the optimizer go on."""
    changes: dict[str, Any] = {"ema": 0.9, "warmup": 2, "rates": {"adapter": 1e-3, "unet": 1e-4}}
    whole, first, second = (task_of(compositing()) for _ in range(3))
    train(whole, compositing(steps=4, swap=0.5, **changes), tmp_path / "whole")
    train(first, compositing(steps=3, swap=2 / 3, **changes), tmp_path / "parts")
    train(second, compositing(steps=4, swap=0.5, **changes), tmp_path / "parts")
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, second.module.state_dict()[name]), name


def test_a_run_that_is_killed_goes_on_exactly(tmp_path: Path) -> None:
    """By SIGKILL, in the middle of step 3 of 4; what it saved last is step 2."""
    settings = compositing(steps=4, ema=0.5, rates={"adapter": 1e-3, "unet": 1e-4})
    task, calls = task_of(settings), itertools.count(1)
    if os.fork() == 0:
        task.module.register_forward_pre_hook(
            lambda *_: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == 3 else None
        )
        train(task, settings, tmp_path / "killed")
        os._exit(0)
    assert os.WTERMSIG(os.wait()[1]) == signal.SIGKILL
    assert torch.load(tmp_path / "killed" / "last.pt", weights_only=True)["step"] == 2
    train(task, settings, tmp_path / "killed")
    train(task_of(settings), settings, tmp_path / "whole")
    states = [torch.load(tmp_path / f / "mean.pt", weights_only=True) for f in ("killed", "whole")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_encoder_alone_goes_on(tmp_path: Path) -> None:
    settings = views(rates={"backbone": 1e-3, "adapter": 1e-3, "unet": 1e-3})
    task = task_of(settings)
    train(task, settings, tmp_path)
    trained = torch.load(tmp_path / "mean.pt", weights_only=True)
    model, fresh = tiny_imprint(seed=1), tiny_imprint(seed=1)
    load_parts(model, trained, ("backbone", "adapter"))
    encoder, unet = model.id_encoder, model.unet
    assert torch.equal(encoder.projector.weight, trained["adapter.weight"])
    assert all(torch.equal(w, trained[f"backbone.{n}"]) for n, w in encoder.backbone.state_dict().items())
    assert all(torch.equal(w, fresh.unet.state_dict()[n]) for n, w in unet.state_dict().items())
    load_parts(model, trained, ("unet",))
    assert torch.equal(unet.conv_out.weight, trained["unet.conv_out.weight"])
