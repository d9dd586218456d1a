"""The loop every stage of training runs in: Accelerate, DDP or FSDP, accumulation, EMA, exact resume, curves.

All that is random about a sample follows from its number (see `NumberedDataset`), so a run that is killed and
resumed, or spread over several processes, sees exactly the samples, noises and timesteps of one that is not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, ParamSpec, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from training.curves import Curves
from training.replacing import replacing
from training.sharding import local, shard, spread, whole

_Arguments = ParamSpec("_Arguments")

Batch = Mapping[str, Tensor]
Draw = Callable[[Mapping[str, Tensor]], NDArray[np.uint8]]
"""Draws a sheet of samples, (H, W, 3) RGB, with weights of a task's module."""

Precision = Literal["no", "bf16", "fp16"]

PATIENCE = timedelta(days=7)
"""How long processes wait for the one that draws or encodes; PyTorch alone would give up in half an hour."""


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
    precision: Precision = "no"
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


def join_processes(precision: Precision = "no", accumulate: int = 1) -> Accelerator:
    """This process's place among those of the launch.

    Each stage has its own, with its own precision. The first one connects the processes with each other;
    `part_processes` parts them.
    """
    AcceleratorState._reset_state()  # Accelerate knows one precision per program; the connections stay
    return Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=accumulate,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )


def part_processes() -> None:
    """Ends the connections between the processes: the last thing that a program does."""
    accelerator = join_processes()
    # together: who leaves early takes its connections along, and the others wait for them for ever
    accelerator.wait_for_everyone()
    accelerator.end_training()


def on_main_process(work: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """Makes one process alone do a piece of work while the others wait, because it writes files."""

    @functools.wraps(work)
    def alone(*arguments: _Arguments.args, **named: _Arguments.kwargs) -> None:
        accelerator = join_processes()
        if accelerator.is_main_process:
            work(*arguments, **named)
        accelerator.wait_for_everyone()

    return alone


def save_atomically(state: Any, path: Path) -> None:
    """Writes a file that `read_state` reads; a kill never leaves half of one."""
    with replacing(path) as beside:
        torch.save(state, beside)


def read_state(path: Path) -> dict[str, Any]:
    """What `Learner.save` wrote to go on from, or nothing."""
    if not path.exists():
        return {}
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


class Learner:
    """A module and what is kept from one step to the next so that it learns."""

    def __init__(
        self, module: nn.Module, settings: LoopSettings, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        """`scaler` keeps the gradients of fp16 from vanishing; other precisions have none."""
        self.module, self.scaler = module, scaler
        self.trained = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.mean = RunningMean(module, settings.ema) if settings.ema else None

    def weights(self) -> dict[str, Tensor]:
        """Those that are better than the last ones: their mean, if there is one."""
        return whole(self.mean.state_dict(self.module) if self.mean else self.module.state_dict())

    def save(self, step: int, folder: Path | None) -> None:
        """Writes mean.pt, to use, and last.pt, to go on from.

        Every process has to call it, because each may hold a part; the one with a folder writes.
        """
        state: dict[str, Any] = {"step": step, "module": whole(self.module.state_dict())}
        state["optimizer"] = whole(self.optimizer.state_dict())
        if self.mean is not None:
            state["mean"] = whole(self.mean.weights)
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        weights = self.weights()
        if folder:
            save_atomically(weights, folder / "mean.pt")
            # last, because nothing is done again for a step that it tells of
            save_atomically(state, folder / "last.pt")

    def load(self, saved: dict[str, Any]) -> None:
        """Goes on from what `save` wrote, each process with its part. The module has its weights already."""
        for index, values in saved["optimizer"]["state"].items():
            for name, value in values.items():
                if name != "step":  # but the two moments of the gradient
                    values[name] = spread(value, self.trained[index])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.mean is not None and "mean" in saved:
            self.mean.load(saved["mean"])
        if self.scaler is not None and "scaler" in saved:
            self.scaler.load_state_dict(saved["scaler"])


def train(task: Task, settings: LoopSettings, folder: Path, draw: Draw | None = None) -> None:
    """Trains `task.module` for `settings.steps` steps in all, going on from `folder`/last.pt if there is one.

    Writes there: last.pt (weights, optimizer, mean, step), mean.pt (the weights to use), log.csv, and events/
    for TensorBoard. What is saved does not depend on how many processes there are and which holds what.
    Several processes have all to call it; a program that they run ends with `part_processes`.

    Raises:
        LaunchError: the weights are to be spread over several processes, and there is one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = join_processes(settings.precision, settings.accumulate)
    saved = read_state(folder / "last.pt")
    start = saved.get("step", 0)
    if saved:
        task.module.load_state_dict(saved["module"])
    # Accelerate knows FSDP on graphics cards only; PyTorch's own is the same everywhere
    module = shard(task.module, accelerator.device) if settings.shard else accelerator.prepare(task.module)
    learner = Learner(task.module, settings, accelerator.scaler)
    if saved:
        learner.load(saved)
    optimizer = accelerator.prepare(learner.optimizer)
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
                    accelerator.clip_grad_norm_(learner.trained, settings.clip)
                optimizer.step()
                optimizer.zero_grad()
        if learner.mean is not None:
            learner.mean.update(task.module, step)
        progress.set_postfix(curves.add(losses), refresh=False)
        done = step + 1
        if settings.is_due(settings.log_every, done):
            curves.plot(done, losses, rate)
        if settings.is_due(settings.save_every, done):
            learner.save(done, folder if main else None)
            curves.row(done)
        if draw and settings.is_due(settings.draw_every, done):
            weights = learner.weights()
            if main:
                curves.picture(done, draw(weights))
    curves.close()
    accelerator.wait_for_everyone()  # the next stage reads what this one wrote


def _loader(
    dataset: NumberedDataset, settings: LoopSettings, start: int, accelerator: Accelerator
) -> DataLoader[dict[str, Tensor]]:
    """Batches from step `start` on. One DataLoader sample is one number."""
    per_step = settings.batch * settings.accumulate * accelerator.num_processes
    numbers = Numbers(start * per_step, settings.batch, accelerator.process_index, accelerator.num_processes)
    source: Dataset[Any] = dataset  # type: ignore[assignment]
    return DataLoader(source, settings.batch, sampler=numbers, num_workers=settings.workers)
