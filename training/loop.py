"""The loop every stage of training runs in: Accelerate, gradient accumulation, EMA, exact resume.

All that is random about a sample follows from its number (see `NumberedDataset`), so a run that is killed and
resumed, or spread over several processes, sees exactly the samples, noises and timesteps of one that is not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

Batch = Mapping[str, Tensor]


class NumberedDataset(Protocol):
    """An endless dataset: item n is a function of n alone, drawn by a generator that is seeded with n."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The sample of that number, as arrays or tensors."""


class Task(Protocol):
    """What a stage of training has of its own."""

    @property
    def module(self) -> nn.Module:
        """Holds the weights; those with `requires_grad` are trained."""

    def dataset(self) -> NumberedDataset:
        """Where the samples come from."""

    def loss(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Mean losses of a batch: 'loss' is minimised, the others are shown."""


@dataclass(frozen=True)
class LoopSettings:
    """How long and how fast to train."""

    steps: int
    batch: int = 16
    """Samples per process and forward pass."""
    accumulate: int = 1
    """Forward passes per step."""
    learning_rate: float = 1e-5
    weight_decay: float = 0.01
    warmup: int = 0
    """Steps over which the learning rate rises from zero."""
    final_rate: float = 1.0
    """The learning rate falls along a cosine to this fraction of itself."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.0
    """Decay of the running mean of the weights; 0 for none."""
    precision: str = "no"
    """'no' (fp32), 'bf16' or 'fp16', as Accelerate names them."""
    save_every: int = 500
    workers: int = 0
    """Processes that prepare data; 0 prepares it in the loop."""

    def rate(self, step: int) -> float:
        """Factor on the learning rate at a step."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = min((step - self.warmup) / max(self.steps - self.warmup, 1), 1.0)
        return self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * progress))


class Numbers(Sampler[int]):
    """The sample numbers of one process: of each global batch, its own share."""

    def __init__(self, first: int, share: int, process: int, processes: int) -> None:
        self.first, self.share, self.process, self.processes = first, share, process, processes

    def __iter__(self) -> Iterator[int]:
        start = self.first
        while True:
            begin = start + self.process * self.share
            yield from range(begin, begin + self.share)
            start += self.share * self.processes


class RunningMean:
    """Exponential moving average of the trained weights."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Moves the mean towards the weights; early on faster, so that it forgets the random start."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, weight in module.named_parameters():
            if name in self.weights:
                self.weights[name].lerp_(weight.detach(), 1 - decay)

    def state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        """The module's state with the mean in place of the trained weights."""
        return {**module.state_dict(), **self.weights}


def save_atomically(state: Any, path: Path) -> None:
    """Writes beside the place and renames, so that a kill never leaves half a file."""
    beside = path.with_suffix(".part")
    torch.save(state, beside)
    beside.replace(path)


def train(task: Task, settings: LoopSettings, folder: Path) -> None:
    """Trains `task.module` for `settings.steps` steps in all, going on from `folder`/last.pt if there is one.

    Writes there: last.pt (weights, optimizer, mean, step), mean.pt (the weights to use) and log.csv.
    """
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        mixed_precision=settings.precision, gradient_accumulation_steps=settings.accumulate
    )
    trained = [p for p in task.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, settings.learning_rate, weight_decay=settings.weight_decay)
    mean = RunningMean(task.module, settings.ema) if settings.ema else None
    start = restore(task.module, optimizer, mean, folder / "last.pt")
    if mean is not None:
        mean.weights = {n: w.to(accelerator.device) for n, w in mean.weights.items()}
    module, optimizer = accelerator.prepare(task.module, optimizer)
    batches = iter(_loader(task.dataset(), settings, start, accelerator))
    progress = tqdm(
        range(start, settings.steps),
        initial=start,
        total=settings.steps,
        disable=not accelerator.is_main_process,
    )
    began, shown = time.monotonic(), dict[str, float]()
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * settings.rate(step)
        for _ in range(settings.accumulate):
            batch = {name: value.to(accelerator.device) for name, value in next(batches).items()}
            with accelerator.accumulate(module), accelerator.autocast():
                losses = task.loss(module, batch)
                accelerator.backward(losses["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trained, settings.clip)
                optimizer.step()
                optimizer.zero_grad()
        if mean is not None:
            mean.update(task.module, step)
        for name, value in losses.items():
            shown[name] = 0.98 * shown.get(name, value.item()) + 0.02 * value.item()
        progress.set_postfix({name: f"{value:.4f}" for name, value in shown.items()}, refresh=False)
        if accelerator.is_main_process and (
            (step + 1) % settings.save_every == 0 or step + 1 == settings.steps
        ):
            save(task.module, optimizer, mean, step + 1, folder)
            _log(folder / "log.csv", step + 1, time.monotonic() - began, shown)
    accelerator.end_training()


def save(
    module: nn.Module, optimizer: torch.optim.Optimizer, mean: RunningMean | None, step: int, folder: Path
) -> None:
    """Writes last.pt, to go on from, and mean.pt, to use."""
    state = {"step": step, "module": module.state_dict(), "optimizer": optimizer.state_dict()}
    if mean is not None:
        state["mean"] = mean.weights
    save_atomically(state, folder / "last.pt")
    save_atomically(mean.state_dict(module) if mean else module.state_dict(), folder / "mean.pt")


def restore(module: nn.Module, optimizer: torch.optim.Optimizer, mean: RunningMean | None, path: Path) -> int:
    """Loads what `save` wrote; returns the number of steps done, 0 if there is nothing."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    if mean is not None:
        mean.weights = state["mean"]
    return int(state["step"])


def _loader(
    dataset: NumberedDataset, settings: LoopSettings, start: int, accelerator: Accelerator
) -> DataLoader[dict[str, Tensor]]:
    """Batches from step `start` on. One DataLoader sample is one number."""
    per_step = settings.batch * settings.accumulate * accelerator.num_processes
    numbers = Numbers(start * per_step, settings.batch, accelerator.process_index, accelerator.num_processes)
    source: Dataset[Any] = dataset  # type: ignore[assignment]
    return DataLoader(source, settings.batch, sampler=numbers, num_workers=settings.workers)


def _log(path: Path, step: int, seconds: float, losses: Mapping[str, float]) -> None:
    """One line per checkpoint: the curve that docs/training.md shows."""
    if not path.exists():
        path.write_text(",".join(["step", "seconds", *losses]) + "\n")
    with path.open("a") as file:
        file.write(",".join([str(step), f"{seconds:.0f}", *(f"{v:.5f}" for v in losses.values())]) + "\n")
