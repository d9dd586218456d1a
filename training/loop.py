"""The loop of every stage of training: Accelerate, DDP or FSDP, accumulation, EMA, exact resume, curves.

Everything random about a sample follows from its number (see `NumberedDataset`), so a run that is killed and
resumed, or split over several processes, sees exactly the samples, noises and timesteps of one that is not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, ParamSpec, Protocol, runtime_checkable

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from engines.files import replacing
from runtime.errors import InputError
from runtime.progress_bar import ProgressBar
from training.curves import Curves
from training.sharding import gather, shard, shard_module, to_local
from training.workers import worker_count

_Arguments = ParamSpec("_Arguments")

Batch = Mapping[str, Tensor]
SampleSheet = Callable[[Mapping[str, Tensor]], NDArray[np.uint8]]
"""Draws a sheet of samples, (H, W, 3) RGB, with weights of a task's module."""

Precision = Literal["no", "bf16", "fp16"]

PATIENCE = timedelta(days=7)
"""How long processes wait for the one that draws or encodes; PyTorch alone would give up in half an hour."""


class NumberedDataset(Protocol):
    """An endless dataset: item n is a function of n alone, drawn by a generator that is seeded with n."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Gives the sample of that number, as arrays or tensors."""


@runtime_checkable
class DeviceDataset(Protocol):
    """An endless dataset that makes whole batches where they are used: item n is a function of n alone."""

    def batch(self, numbers: range, device: torch.device) -> dict[str, Tensor]:
        """Gives the samples of these numbers, stacked; all tensors are on the device."""


class Task(Protocol):
    """What a stage of training has of its own."""

    @property
    def module(self) -> nn.Module:
        """Holds the weights; those with `requires_grad` are trained."""

    def dataset(self) -> NumberedDataset:
        """Gives the samples to train on."""

    def loss(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Computes the mean losses of a batch: 'loss' is minimised, the others are shown."""


@dataclass(frozen=True)
class LoopSettings:
    """How long and how fast to train."""

    steps: int
    batch: int = 16
    """Samples per process and forward pass."""
    accumulate: int = 1
    """Forward passes per step."""
    learning_rate: float = 1e-5
    rates: Mapping[str, float] = field(default_factory=dict)
    """Part of the network, a child of the task's module -> its own learning rate."""
    swap: float = 1.0
    """Share of the steps after which two parts exchange their rates; 1 for never."""
    weight_decay: float = 0.01
    warmup: int = 0
    """Steps over which the learning rate rises from zero."""
    final_rate: float = 1.0
    """The learning rate falls along a cosine to this fraction of itself."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.0
    """Decay of the moving average of the weights; 0 for none."""
    precision: Precision = "no"
    """'no' (fp32), 'bf16' or 'fp16', as Accelerate names them."""
    save_every: int = 500
    draw_every: int = 1000
    """Steps between sheets of samples, for stages that can draw any."""
    log_every: int = 20
    """Steps between points of TensorBoard's curves."""
    shard: bool = False
    """Weights, gradients and optimizer state are sharded over the processes (FSDP); otherwise each has all of
    them (DDP)."""
    workers: int = 0
    """Processes that prepare data; 0 prepares it in the loop."""

    def __post_init__(self) -> None:
        if not 0 < self.swap <= 1 or (self.swap < 1 and len(self.rates) != 2):
            raise InputError(
                f"swap is {self.swap:g} with {len(self.rates)} rates; expected a share of the steps, above 0 "
                "and at most 1, and two rates to exchange"
            )

    def part_rate(self, part: str, step: int) -> float:
        """Gives the learning rate of a part at a step, warm-up, decay and exchange included."""
        rates = self.rates
        if self.swap * self.steps <= step and self.swap < 1:
            rates = dict(zip(rates, reversed(list(rates.values())), strict=True))
        return rates.get(part, self.learning_rate) * self.rate(step)

    def rate(self, step: int) -> float:
        """Gives the factor on the learning rate at a step: a linear warm-up, then a cosine."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = min((step - self.warmup) / max(self.steps - self.warmup, 1), 1.0)
        return self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * progress))

    def is_due(self, every: int, done: int) -> bool:
        """Says whether what is done every so many steps is due after `done` steps; after the last it is."""
        return done % every == 0 or done == self.steps


class ShardedSampler(Sampler[int]):
    """The sample numbers of one process: its own share of each global batch."""

    def __init__(self, first: int, share: int, process: int, processes: int) -> None:
        self.first, self.share, self.process, self.processes = first, share, process, processes

    def __iter__(self) -> Iterator[int]:
        start = self.first
        while True:
            begin = start + self.process * self.share
            yield from range(begin, begin + self.share)
            start += self.share * self.processes


class EMA:
    """Exponential moving average of the trained weights."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Moves the average towards the weights; faster early on, so that it forgets the random start."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, weight in module.named_parameters():
            if name in self.weights:
                to_local(self.weights[name]).lerp_(to_local(weight.detach()), 1 - decay)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Goes on from an average that was saved."""
        self.weights = {name: shard(weights[name], like) for name, like in self.weights.items()}

    def state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        """Gives the module's state with the average in place of the trained weights."""
        return {**module.state_dict(), **self.weights}


def join_processes(precision: Precision = "no", accumulate: int = 1) -> Accelerator:
    """Joins this process with the others of its launch.

    Each stage has its own, with its own precision. The first one connects the processes with each other;
    `part_processes` parts them.
    """
    AcceleratorState._reset_state()  # Accelerate has one precision per program; the connections stay
    return Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=accumulate,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )


def part_processes() -> None:
    """Ends the connections between the processes: the last thing that a program does."""
    accelerator = join_processes()
    # together: a process that leaves early closes its connections, and the others wait for them indefinitely
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
    with replacing(path) as partial:
        torch.save(state, partial)


def read_state(path: Path) -> dict[str, Any]:
    """Reads what `TrainState.save` wrote to go on from; empty if there is nothing."""
    if not path.exists():
        return {}
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def parts_to_train(module: nn.Module, rates: Mapping[str, float]) -> dict[str, list[nn.Parameter]]:
    """Groups the weights that learn: one group per part with a rate of its own, "" for all others.

    Raises:
        InputError: a rate is for a part that does not exist, or does not learn.
    """
    groups: dict[str, list[nn.Parameter]] = {}
    for name, weight in module.named_parameters():
        if weight.requires_grad:
            part = name.partition(".")[0]
            groups.setdefault(part if part in rates else "", []).append(weight)
    for part in rates:
        if part not in groups:
            learning = {name.partition(".")[0] for name, p in module.named_parameters() if p.requires_grad}
            raise InputError(
                f"rates has '{part}', which does not learn; those that do: {', '.join(sorted(learning))}"
            )
    return groups


class TrainState:
    """A module, and what is kept from one step to the next to train it."""

    def __init__(
        self, module: nn.Module, settings: LoopSettings, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        """`scaler` keeps the gradients of fp16 from vanishing; other precisions have none."""
        self.module, self.scaler = module, scaler
        groups = parts_to_train(module, settings.rates)
        self.parts = list(groups)
        """Those with rates of their own, and "" if there are others: the optimizer's groups."""
        self.trained = [weight for weights in groups.values() for weight in weights]
        self.optimizer = torch.optim.AdamW(
            [{"params": weights} for weights in groups.values()],
            settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        self.ema = EMA(module, settings.ema) if settings.ema else None

    def weights(self) -> dict[str, Tensor]:
        """Gives the weights to use: their average if there is one, else the last ones."""
        return gather(self.ema.state_dict(self.module) if self.ema else self.module.state_dict())

    def save(self, step: int, folder: Path | None) -> None:
        """Writes mean.pt, to use, and last.pt, to go on from.

        Every process must call it, because each may hold a part; the one with a folder writes.
        """
        state: dict[str, Any] = {"step": step, "module": gather(self.module.state_dict())}
        state["optimizer"] = gather(self.optimizer.state_dict())
        if self.ema is not None:
            state["mean"] = gather(self.ema.weights)
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        weights = self.weights()
        if folder:
            save_atomically(weights, folder / "mean.pt")
            # last, because a step that it counts is not done again
            save_atomically(state, folder / "last.pt")

    def load(self, saved: dict[str, Any]) -> None:
        """Goes on from what `save` wrote, each process with its part. The module has its weights already."""
        for index, values in saved["optimizer"]["state"].items():
            for name, value in values.items():
                if name != "step":  # the others are the two moments of the gradient
                    values[name] = shard(value, self.trained[index])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.ema is not None and "mean" in saved:
            self.ema.load(saved["mean"])
        if self.scaler is not None and "scaler" in saved:
            self.scaler.load_state_dict(saved["scaler"])


def train(
    task: Task,
    settings: LoopSettings,
    folder: Path,
    draw: SampleSheet | None = None,
    keep: Callable[[int, Mapping[str, Tensor]], None] | None = None,
) -> None:
    """Trains `task.module` for `settings.steps` steps in all, going on from `folder`/last.pt if there is one.

    Writes there: last.pt (weights, optimizer, average, step), mean.pt (the weights to use), log.csv, and
    events/ for TensorBoard. What is saved does not depend on how many processes there are and which holds
    what. All processes of a launch must call it; a program that they run ends with `part_processes`.

    Args:
        task: what to train, on which samples.
        settings: how long and how fast.
        folder: of this stage; is made if it is not there.
        draw: draws a sheet of samples now and then.
        keep: is given the step and the weights to use whenever they are saved.

    Raises:
        LaunchError: the weights are to be sharded over several processes, and there is one.
    """
    accelerator = join_processes(settings.precision, settings.accumulate)
    saved = read_state(folder / "last.pt")
    if saved:
        task.module.load_state_dict(saved["module"])
    # Accelerate has FSDP on graphics cards only; PyTorch's own is the same everywhere
    module = (
        shard_module(task.module, accelerator.device) if settings.shard else accelerator.prepare(task.module)
    )
    state = TrainState(task.module, settings, accelerator.scaler)
    if saved:
        state.load(saved)
    start, main = saved.get("step", 0), accelerator.is_main_process
    step_over = _Stepper(task, module, state, settings, accelerator, start)
    curves = Curves(folder, start, step_over.samples, write=main)
    progress = ProgressBar(
        range(start, settings.steps), initial=start, total=settings.steps, disable=not main
    )
    for step in progress:
        rates = {part: settings.part_rate(part, step) for part in state.parts}
        losses = step_over(rates)
        if state.ema is not None:
            state.ema.update(task.module, step)
        progress.set_postfix(curves.add(losses), refresh=False)
        done = step + 1
        if settings.is_due(settings.log_every, done):
            curves.plot(done, losses, rates)
        if settings.is_due(settings.save_every, done):
            state.save(done, folder if main else None)
            curves.row(done)
            # all processes gather the weights, one takes them
            if keep and (weights := state.weights()) and main:
                keep(done, weights)
        if draw and settings.is_due(settings.draw_every, done) and (weights := state.weights()) and main:
            curves.picture(done, draw(weights))
    curves.close()
    accelerator.wait_for_everyone()  # the next stage reads what this one wrote


class _Stepper:
    """Takes the steps of the optimizer, each over as many batches as are accumulated."""

    def __init__(
        self,
        task: Task,
        module: nn.Module,
        state: TrainState,
        settings: LoopSettings,
        accelerator: Accelerator,
        start: int,
    ) -> None:
        self._task, self._module, self._state = task, module, state
        self._settings, self._accelerator = settings, accelerator
        self._optimizer = accelerator.prepare(state.optimizer)
        self.samples = settings.batch * settings.accumulate * accelerator.num_processes
        """Samples of a step, of all processes."""
        sampler = ShardedSampler(
            start * self.samples, settings.batch, accelerator.process_index, accelerator.num_processes
        )
        self._batches = iter(load_batches(task.dataset(), settings, sampler))

    def __call__(self, rates: Mapping[str, float]) -> dict[str, Tensor]:
        """Takes one step with the learning rate of each part; returns the losses of its last batch."""
        accelerator, optimizer = self._accelerator, self._optimizer
        for group, part in zip(optimizer.param_groups, self._state.parts, strict=True):
            group["lr"] = rates[part]
        for _ in range(self._settings.accumulate):
            batch = {name: value.to(accelerator.device) for name, value in next(self._batches).items()}
            with accelerator.accumulate(self._module), accelerator.autocast():
                losses = self._task.loss(self._module, batch)
                accelerator.backward(losses["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self._state.trained, self._settings.clip)
                optimizer.step()
                optimizer.zero_grad()
        return losses


def load_batches(
    dataset: NumberedDataset, settings: LoopSettings, sampler: ShardedSampler
) -> DataLoader[dict[str, Tensor]]:
    """Loads a process's samples in batches, in `settings.workers` processes."""
    source: Dataset[Any] = dataset  # type: ignore[assignment]
    return DataLoader(source, settings.batch, sampler=sampler, num_workers=worker_count(settings.workers))
