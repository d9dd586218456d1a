"""The loop every stage of training runs in: Accelerate, DDP or FSDP, accumulation, EMA, exact resume, curves.

All that is random about a sample follows from its number (see `NumberedDataset`), so a run that is killed and
resumed, or spread over several processes, sees exactly the samples, noises and timesteps of one that is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from training.curves import Curves
from training.sharding import local, shard, spread, whole

Batch = Mapping[str, Tensor]
Draw = Callable[[Mapping[str, Tensor]], NDArray[np.uint8]]
"""Draws a sheet of samples, (H, W, 3) RGB, with weights of a task's module."""


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
    draw_every: int = 1000
    """Steps between sheets of samples, for stages that can draw any."""
    log_every: int = 20
    """Steps between points of TensorBoard's curves."""
    shard: bool = False
    """Weights, gradients and optimizer state are spread over the processes (FSDP); otherwise each has all of
    them (DDP)."""
    workers: int = 0
    """Processes that prepare data; 0 prepares it in the loop."""

    def rate(self, step: int) -> float:
        """Factor on the learning rate at a step."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = min((step - self.warmup) / max(self.steps - self.warmup, 1), 1.0)
        return self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * progress))

    def is_due(self, every: int, done: int) -> bool:
        """Whether what is done every so many steps is to be done after `done` steps; after the last it is."""
        return done % every == 0 or done == self.steps


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
                local(self.weights[name]).lerp_(local(weight.detach()), 1 - decay)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Goes on from a mean that was saved."""
        self.weights = {name: spread(weights[name], like) for name, like in self.weights.items()}

    def state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        """The module's state with the mean in place of the trained weights."""
        return {**module.state_dict(), **self.weights}


def save_atomically(state: Any, path: Path) -> None:
    """Writes beside the place and renames, so that a kill never leaves half a file."""
    beside = path.with_suffix(".part")
    torch.save(state, beside)
    beside.replace(path)


def train(task: Task, settings: LoopSettings, folder: Path, draw: Draw | None = None) -> None:
    """Trains `task.module` for `settings.steps` steps in all, going on from `folder`/last.pt if there is one.

    Writes there: last.pt (weights, optimizer, mean, step), mean.pt (the weights to use), log.csv, and events/
    for TensorBoard. What is saved does not depend on how many processes there are and which holds what.
    """
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        mixed_precision=settings.precision, gradient_accumulation_steps=settings.accumulate
    )
    saved = read_state(folder / "last.pt")
    start = saved.get("step", 0)
    if saved:
        task.module.load_state_dict(saved["module"])
    # Accelerate knows FSDP on graphics cards only; PyTorch's own is the same everywhere
    module = shard(task.module, accelerator.device) if settings.shard else accelerator.prepare(task.module)
    trained = [p for p in task.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, settings.learning_rate, weight_decay=settings.weight_decay)
    mean = RunningMean(task.module, settings.ema) if settings.ema else None
    if saved:
        load_optimizer(optimizer, saved["optimizer"], trained)
        if mean is not None:
            mean.load(saved["mean"])
    optimizer = accelerator.prepare(optimizer)
    batches = iter(_loader(task.dataset(), settings, start, accelerator))
    main = accelerator.is_main_process
    samples = settings.batch * settings.accumulate * accelerator.num_processes
    curves = Curves(folder, start, samples, write=main)
    progress = tqdm(range(start, settings.steps), initial=start, total=settings.steps, disable=not main)
    for step in progress:
        rate = settings.learning_rate * settings.rate(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
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
        progress.set_postfix(curves.add(losses), refresh=False)
        done = step + 1
        if settings.is_due(settings.log_every, done):
            curves.plot(done, losses, rate)
        if settings.is_due(settings.save_every, done):
            save(task.module, optimizer, mean, done, folder if main else None)
            curves.row(done)
        if draw and settings.is_due(settings.draw_every, done):
            weights = whole(to_use(task.module, mean))
            if main:
                curves.picture(done, draw(weights))
    curves.close()
    # together: who leaves early takes its connections along, and the others wait for them for ever
    accelerator.wait_for_everyone()
    accelerator.end_training()


def to_use(module: nn.Module, mean: RunningMean | None) -> dict[str, Tensor]:
    """The weights that are better than the last ones: their mean, if there is one."""
    return mean.state_dict(module) if mean else module.state_dict()


def save(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    mean: RunningMean | None,
    step: int,
    folder: Path | None,
) -> None:
    """Writes last.pt, to go on from, and mean.pt, to use.

    Every process has to call it, because each may hold a part; the one with a folder writes.
    """
    state = {"step": step, "module": whole(module.state_dict()), "optimizer": whole(optimizer.state_dict())}
    if mean is not None:
        state["mean"] = whole(mean.weights)
    weights = whole(to_use(module, mean))
    if folder:
        save_atomically(state, folder / "last.pt")
        save_atomically(weights, folder / "mean.pt")


def read_state(path: Path) -> dict[str, Any]:
    """What `save` wrote, or nothing."""
    if not path.exists():
        return {}
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def load_optimizer(
    optimizer: torch.optim.Optimizer, saved: dict[str, Any], trained: Sequence[nn.Parameter]
) -> None:
    """Puts back the optimizer's state, each process its part."""
    for index, values in saved["state"].items():
        for name, value in values.items():
            if value.shape == trained[index].shape:  # moments; the count of steps is a number
                values[name] = spread(value, trained[index])
    optimizer.load_state_dict(saved)


def _loader(
    dataset: NumberedDataset, settings: LoopSettings, start: int, accelerator: Accelerator
) -> DataLoader[dict[str, Tensor]]:
    """Batches from step `start` on. One DataLoader sample is one number."""
    per_step = settings.batch * settings.accumulate * accelerator.num_processes
    numbers = Numbers(start * per_step, settings.batch, accelerator.process_index, accelerator.num_processes)
    source: Dataset[Any] = dataset  # type: ignore[assignment]
    return DataLoader(source, settings.batch, sampler=numbers, num_workers=settings.workers)
