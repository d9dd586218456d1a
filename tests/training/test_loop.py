"""The training loop: one step against a hand-written one, frozen parts, exact resume, overfitting."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from tests.support.tiny import TINY, RandomPairs, open_zero_convolutions
from training.loop import ShardedSampler, join_processes, train
from training.loop_settings import LoopSettings
from training.network.modules import AnyDoor
from training.systems.anydoor import Denoising, DiffusionTask, noisy_latents
from training.train_state import EMA, save_atomically


def diffusion_task(rules: Denoising | None = None, pairs: Any = None) -> DiffusionTask:
    torch.manual_seed(0)
    model = AnyDoor(TINY)
    open_zero_convolutions(model)
    return DiffusionTask(model, pairs or RandomPairs(), rules or Denoising())


def settings(**changes: Any) -> LoopSettings:
    return LoopSettings(**{"steps": 1, "batch": 2, "learning_rate": 1e-3, "save_every": 1, **changes})


def weights(task: DiffusionTask) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in task.module.state_dict().items()}


def test_one_step_is_the_written_out_step(tmp_path: Path) -> None:
    """Noise by the closed formula, mean squared error, gradient clipping and AdamW, all by hand."""
    task, twin = diffusion_task(), diffusion_task()
    train(task, settings(log_every=1), tmp_path)

    samples = [RandomPairs()[number] for number in range(2)]
    batch = {k: torch.stack([torch.as_tensor(s[k]) for s in samples]) for k in samples[0]}
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    signal = torch.cumprod(1 - betas, 0).float()[batch["timestep"]].view(2, 1, 1, 1)
    noisy = signal.sqrt() * batch["latents"] + (1 - signal).sqrt() * batch["noise"]
    model = twin.module
    tokens = model.projector(batch["features"])
    details = model.control(batch["hint"], batch["timestep"], tokens)
    estimate = model.unet(
        noisy,
        batch["timestep"],
        encoder_hidden_states=tokens,
        down_block_additional_residuals=details[:-1],
        mid_block_additional_residual=details[-1],
    ).sample
    loss = ((estimate - batch["noise"]) ** 2).mean()
    loss.backward()
    assert curves(tmp_path).Scalars("loss/loss")[0].value == pytest.approx(loss.item(), rel=1e-5)
    learned = {n: p for n, p in model.named_parameters() if p.requires_grad}
    norm = torch.sqrt(sum((p.grad**2).sum() for p in learned.values()))  # type: ignore[arg-type]
    after = task.module.state_dict()
    for name, weight in learned.items():
        gradient = weight.grad * torch.clamp(1.0 / (norm + 1e-6), max=1.0)
        # AdamW's first step: both moments are corrected to the gradient itself
        expected = weight * (1 - 1e-3 * 0.01) - 1e-3 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("rules", "moving"),
    [
        (Denoising(), ("control.", "projector.", "unet.up_blocks.", "unet.conv_norm_out.", "unet.conv_out.")),
        (
            Denoising(control=False, projector=False),
            ("unet.up_blocks.", "unet.conv_norm_out.", "unet.conv_out."),
        ),
        (Denoising(unet_encoder=True), ("control.", "projector.", "unet.")),
    ],
)
def test_what_is_frozen_does_not_move_by_a_bit(
    rules: Denoising, moving: tuple[str, ...], tmp_path: Path
) -> None:
    task = diffusion_task(rules)
    before = weights(task)
    train(task, settings(steps=2), tmp_path)
    moved = {name for name, value in weights(task).items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith(moving) for name in moved)
    assert not any(name.startswith("control.conv_in.") for name in moved)
    for prefix in moving:
        assert any(name.startswith(prefix) for name in moved), prefix


def test_the_average_follows_the_weights_faster_at_first() -> None:
    """At step s it keeps (1 + s) / (10 + s) of what it was, until that is more than its decay."""
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    average = EMA(module, decay=0.9)
    torch.nn.init.ones_(module.weight)
    expected = 0.0
    for step, kept in ((0, 0.1), (8, 0.5), (79, 80 / 89), (80, 0.9), (8000, 0.9)):
        average.update(step)
        expected = kept * expected + (1 - kept)
        assert average.weights["weight"].item() == pytest.approx(expected)


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole, first, second = diffusion_task(), diffusion_task(), diffusion_task()
    changes: dict[str, Any] = {"ema": 0.9, "warmup": 3, "save_every": 2}
    train(whole, settings(steps=4, **changes), tmp_path / "whole")
    # the learning rate depends on the step, not on the length: a shorter run is a run that was killed
    train(first, settings(steps=2, **changes), tmp_path / "parts")
    train(second, settings(steps=4, **changes), tmp_path / "parts")
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name]), name
    states = [torch.load(tmp_path / f / "mean.pt", weights_only=True) for f in ("whole", "parts")]
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])


def test_a_run_that_is_killed_while_it_saves_leaves_no_old_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two files of the last checkpoint: what is to be used is made again, or there already."""
    train(diffusion_task(), settings(steps=2, ema=0.9), tmp_path / "whole")

    def killed(state: Any, path: Path) -> None:
        save_atomically(state, path)
        raise KeyboardInterrupt

    train(diffusion_task(), settings(steps=1, ema=0.9), tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr("training.train_state.save_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            train(diffusion_task(), settings(steps=2, ema=0.9), tmp_path / "killed")
    train(diffusion_task(), settings(steps=2, ema=0.9), tmp_path / "killed")
    states = [torch.load(tmp_path / f / "mean.pt", weights_only=True) for f in ("whole", "killed")]
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])


def test_the_scale_of_fp16_s_gradients_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a scaler on the CPU, where fp16 itself cannot be trained."""

    def with_scaler(*arguments: Any) -> Accelerator:
        accelerator = join_processes(*arguments)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        return accelerator

    monkeypatch.setattr("training.loop.join_processes", with_scaler)
    train(diffusion_task(), settings(steps=3), tmp_path / "whole")
    for steps in (1, 3):
        train(diffusion_task(), settings(steps=steps), tmp_path / "parts")
    states = [torch.load(tmp_path / f / "last.pt", weights_only=True) for f in ("whole", "parts")]
    assert states[0]["scaler"]["scale"] == 16.0
    assert states[0]["scaler"] == states[1]["scaler"]
    assert all(torch.equal(states[0]["module"][n], states[1]["module"][n]) for n in states[0]["module"])


def test_each_training_of_a_program_has_its_own_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    runs = (("no", True), ("bf16", False), ("no", False), ("auto", False), ("auto", True))
    for precision, has_bf16 in runs:
        monkeypatch.setattr("training.loop.has_bf16", lambda _, has=has_bf16: has)
        task = diffusion_task()
        task.module.unet.conv_in.register_forward_hook(lambda *call: seen.append(call[2].dtype))
        train(task, settings(precision=precision), tmp_path / str(len(seen)))
    assert seen == [torch.float32, torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]


def test_what_is_trained_in_bf16_is_kept_in_fp32(tmp_path: Path) -> None:
    train(diffusion_task(), settings(precision="bf16", ema=0.9), tmp_path)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    moments = [state["optimizer"]["state"][0][name] for name in ("exp_avg", "exp_avg_sq")]
    kept = [*state["module"].values(), *state["mean"].values(), *moments]
    assert {value.dtype for value in kept if value.is_floating_point()} == {torch.float32}


def test_another_kind_of_device_goes_on_from_the_average_with_fresh_moments(tmp_path: Path) -> None:
    """A run of a card, as far as a file tells."""
    train(diffusion_task(), settings(steps=3, ema=0.9), tmp_path)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["device"] == "cpu"
    save_atomically({**state, "device": "cuda"}, tmp_path / "last.pt")
    task = diffusion_task()
    train(task, settings(steps=4, ema=0.9), tmp_path)
    on = torch.load(tmp_path / "last.pt", weights_only=True)
    assert on["step"] == 4
    assert on["optimizer"]["state"][0]["step"] == 1
    for name, average in state["mean"].items():
        # AdamW's first step changes a weight by the learning rate at most, beside its decay
        torch.testing.assert_close(on["module"][name], average, rtol=1e-5, atol=1.01e-3)
    assert any(not torch.equal(state["mean"][name], state["module"][name]) for name in state["mean"])


def test_accumulated_batches_are_one_large_batch(tmp_path: Path) -> None:
    large, small = diffusion_task(), diffusion_task()
    train(large, settings(batch=4), tmp_path / "large")
    train(small, settings(batch=2, accumulate=2), tmp_path / "small")
    differences = [(value - weights(small)[name]).abs() for name, value in weights(large).items()]
    # AdamW's first step is the gradient's sign, which rounding decides where the gradient is next to nothing
    assert torch.cat([d.flatten() for d in differences]).gt(2e-5).float().mean() < 1e-4


def test_checkpointing_changes_nothing(tmp_path: Path) -> None:
    kept, again = diffusion_task(), diffusion_task(Denoising(checkpointing=True))
    passes = [count_passes(task) for task in (kept, again)]
    train(kept, settings(), tmp_path / "kept")
    train(again, settings(), tmp_path / "again")
    assert passes == [[1, 1], [2, 2]]  # forth, and again on the way back
    for name, value in weights(kept).items():
        torch.testing.assert_close(value, weights(again)[name])


def count_passes(task: DiffusionTask) -> list[int]:
    """How often the first blocks of ControlNet and UNet decoder are computed, counted from now on."""
    counts = [0, 0]

    def count(part: int) -> None:
        counts[part] += 1

    for part, block in enumerate((task.module.control.down_blocks[0], task.module.unet.up_blocks[0])):
        block.resnets[0].register_forward_pre_hook(lambda *_, part=part: count(part))
    return counts


def curves(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "events"), {"scalars": 0, "images": 0})
    events.Reload()
    return events


def test_tensorboard_shows_curves_and_samples(tmp_path: Path) -> None:
    seen = []

    def draw(weights: Mapping[str, Tensor]) -> NDArray[np.uint8]:
        seen.append({name: value.clone() for name, value in weights.items()})
        return np.full((8, 12, 3), 40 * len(seen), np.uint8)

    task = diffusion_task()
    train(task, settings(steps=5, ema=0.5, log_every=2, draw_every=2, warmup=4), tmp_path, draw)
    events = curves(tmp_path)
    assert [point.step for point in events.Scalars("loss/loss")] == [2, 4, 5]
    assert [point.value for point in events.Scalars("learning rate")] == pytest.approx([0.5e-3, 1e-3, 1e-3])
    assert all(point.value > 0 for point in events.Scalars("samples per second"))
    assert [picture.step for picture in events.Images("samples")] == [2, 4, 5]
    sheet = Image.open(io.BytesIO(events.Images("samples")[0].encoded_image_string))
    assert sheet.size == (12, 8)
    assert sheet.getpixel((0, 0)) == (40, 40, 40)
    # drawn with the moving average, which is what the run leaves
    mean = torch.load(tmp_path / "mean.pt", weights_only=True)
    assert all(torch.equal(seen[-1][name], value) for name, value in mean.items())
    name = "unet.conv_out.weight"
    assert not torch.equal(mean[name], task.module.state_dict()[name])


def test_a_killed_run_s_curves_go_on_from_its_checkpoint(tmp_path: Path) -> None:
    def killed(weights: Mapping[str, Tensor]) -> NDArray[np.uint8]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # after step 3; the last checkpoint is of step 2
        train(diffusion_task(), settings(steps=9, save_every=2, log_every=1, draw_every=3), tmp_path, killed)
    train(diffusion_task(), settings(steps=4, save_every=2, log_every=1), tmp_path)
    assert [point.step for point in curves(tmp_path).Scalars("loss/loss")] == [1, 2, 3, 4]


def test_processes_share_the_global_batch() -> None:
    shares = [iter(ShardedSampler(first=8, share=2, process=p, processes=2)) for p in range(2)]
    drawn = [[next(share) for _ in range(4)] for share in shares]
    assert drawn == [[8, 9, 12, 13], [10, 11, 14, 15]]


def test_a_tiny_batch_is_learned_by_heart(tmp_path: Path) -> None:
    task = diffusion_task(Denoising(unet_encoder=True), RandomPairs(different=2))
    batch = {
        k: torch.stack([torch.as_tensor(RandomPairs()[n][k]) for n in range(2)]) for k in RandomPairs()[0]
    }
    with torch.no_grad():
        before = task.loss(task.module, batch)["loss"].item()
    train(task, settings(steps=40, learning_rate=4e-3, save_every=40), tmp_path)
    with torch.no_grad():
        after = task.loss(task.module, batch)["loss"].item()
    assert before > 0.8
    assert after < 0.1


def test_noise_replaces_signal_along_the_schedule() -> None:
    latents, noise = torch.full((2, 1, 2, 2), 2.0), torch.full((2, 1, 2, 2), -1.0)
    noisy = noisy_latents(latents, noise, torch.tensor([0, 1]), torch.tensor([1.0, 0.25]))
    torch.testing.assert_close(noisy[0], latents[0])
    torch.testing.assert_close(noisy[1], torch.full((1, 2, 2), 1.0 - 0.75**0.5))
