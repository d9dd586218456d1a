"""Runs the loop of every training stage: Accelerate, DDP or FSDP, accumulation, EMA, exact resume, curves.

Everything random about a sample follows from its number (see `NumberedDataset`), so a run that is killed and
resumed, or split over several processes, sees exactly the samples, noises and timesteps of one that is not.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Sampler

from engines.files import only_writer
from runtime.errors import InputError
from runtime.progress_bar import ProgressBar
from training.capture import CapturedStep
from training.clock import Clock
from training.curves import Curves
from training.loop_settings import LoopSettings, Precision
from training.precision import allow_tf32, has_bf16
from training.sharding import shard_module
from training.short_attention import use_short_attention
from training.train_state import TrainState, fitting, read_state, saved_weights
from training.workers import load_samples, worker_count

_Arguments = ParamSpec("_Arguments")
_Reading = TypeVar("_Reading")

Batch = Mapping[str, Tensor]
SampleSheet = Callable[[Mapping[str, Tensor]], NDArray[np.uint8]]
"""Draws a sheet of samples, (H, W, 3) RGB, with weights of a task's module."""

PATIENCE = timedelta(days=7)
"""How long processes wait for the one that draws or encodes; PyTorch alone would give up in half an hour."""


@runtime_checkable
class NumberedDataset(Protocol):
    """An endless dataset: item n is a function of n alone, drawn by a generator that is seeded with n."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Gives the sample of that number, as arrays or tensors."""


@runtime_checkable
class DeviceDataset(Protocol):
    """An endless dataset that makes whole batches where they are used: a batch follows from its numbers."""

    def batch(self, numbers: range, device: torch.device) -> dict[str, Tensor]:
        """Gives the samples of these numbers, stacked; all tensors are on the device."""


AnyDataset = NumberedDataset | DeviceDataset
"""A dataset that is both makes batches on a card, and single samples on a processor."""


class Task(Protocol):
    """What a stage of training has of its own."""

    @property
    def module(self) -> nn.Module:
        """Holds the weights; those with `requires_grad` are trained."""

    @property
    def network(self) -> nn.Module:
        """Holds all that the loss computes with, the weights among it: what has to be on the device."""

    def dataset(self) -> AnyDataset:
        """Gives the samples to train on."""

    def loss(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Computes the mean losses of a batch: 'loss' is minimised, the others are shown."""


class ShardedSampler(Sampler[int]):
    """The sample numbers of one process: its own share of each global batch."""

    def __init__(self, first: int, share: int, process: int, processes: int) -> None:
        self.first, self.share, self.process, self.processes = first, share, process, processes

    def __iter__(self) -> Iterator[int]:
        for numbers in self.batches():
            yield from numbers

    def batches(self) -> Iterator[range]:
        """Yields the numbers of one batch after the other."""
        start = self.first + self.process * self.share
        while True:
            yield range(start, start + self.share)
            start += self.share * self.processes


def join_processes(precision: Precision = "no", accumulate: int = 1) -> Accelerator:
    """Joins this process with the others of its launch.

    Each stage has its own, with its own precision; 'auto' is the best one of the device. The first one
    connects the processes with each other; `part_processes` parts them.
    """
    AcceleratorState._reset_state()  # Accelerate has one precision per program; the connections stay
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # or the processes of a launch do not find each other there
        mixed_precision="no" if precision == "auto" else precision,
        gradient_accumulation_steps=accumulate,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if precision == "auto" and has_bf16(accelerator.device):
        return join_processes("bf16", accumulate)
    return accelerator


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
        draw: draws a sheet of samples now and then, unless there is a time limit.
        keep: is given the step and the weights to use whenever they are saved.

    Raises:
        BlockingIOError: another training writes into the folder.
        LaunchError: the weights are to be sharded over several processes, and there is one.
        InputError: last.pt is damaged, or of another recipe.
    """
    accelerator = join_processes(settings.precision, settings.accumulate)
    with only_writer(folder) if accelerator.is_main_process else nullcontext():
        _train(task, settings, folder, accelerator, draw, keep)
        accelerator.wait_for_everyone()  # the next stage reads what this one wrote


def _train(
    task: Task,
    settings: LoopSettings,
    folder: Path,
    accelerator: Accelerator,
    draw: SampleSheet | None,
    keep: Callable[[int, Mapping[str, Tensor]], None] | None,
) -> None:
    allow_tf32(settings.precision == "auto")
    last_state, main = folder / "last.pt", accelerator.is_main_process
    saved = read_state(last_state)
    start, clock = saved.get("step", 0), Clock(settings.limit, saved.get("seconds", 0.0))
    step_over = _Stepper(task, settings, accelerator, saved, last_state)
    state, curves = step_over.state, Curves(folder, start, step_over.samples, write=main)
    steps = range(start, start if _agreed(settings, bool(saved) and clock.is_over) else settings.steps)
    for step in (progress := ProgressBar(steps, initial=start, total=settings.steps, disable=not main)):
        over = _agreed(settings, clock.progress)
        rates = {part: settings.part_rate(part, step, over) for part in state.parts}
        progress.set_postfix(curves.add(step_over(rates, step)), refresh=False)
        clock.lap()
        done = step + 1
        last = done == settings.steps or _agreed(settings, clock.is_over)
        if last or done % settings.log_every == 0:
            curves.plot(done, rates)
        if last or _agreed(settings, clock.may_save(done % settings.save_every == 0)):
            with clock.saving():
                state.save(done, clock.counted(last), folder if main else None)
            curves.row(done)
            # all processes gather the weights, one takes them
            if keep and (weights := state.weights()) and main:
                keep(done, weights)
        is_due = not settings.limit and (last or done % settings.draw_every == 0)
        if draw and is_due and (weights := state.weights()) and main:
            curves.picture(done, draw(weights))
        if last:
            break
    curves.close()


def _agreed(settings: LoopSettings, reading: _Reading) -> _Reading:
    """Returns what the main process reads off the clock: all take the same steps."""
    return broadcast_object_list([reading])[0] if settings.limit else reading  # type: ignore[no-any-return]


class _Stepper:
    """Takes the steps of the optimizer, each over as many batches as are accumulated."""

    def __init__(
        self,
        task: Task,
        settings: LoopSettings,
        accelerator: Accelerator,
        saved: Mapping[str, Any],
        where: Path,
    ) -> None:
        """Puts everything on the accelerator's device; goes on from what was `saved`, if anything, and where.

        Raises:
            InputError: what was saved is of another recipe.
        """
        self._task, self._settings, self._accelerator = task, settings, accelerator
        if saved:
            with fitting(where):
                task.module.load_state_dict(saved_weights(saved, accelerator.device))
        task.network.to(accelerator.device)
        if accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16":
            use_short_attention(task.network)
        # Accelerate has FSDP on graphics cards only; PyTorch's own is the same everywhere
        self._module = (
            shard_module(task.module, accelerator.device)
            if settings.shard
            else accelerator.prepare(task.module)
        )
        if settings.compile and accelerator.device.type == "cpu":
            self._module = _compiled(self._module)
        self.state = TrainState(task.module, settings, accelerator.scaler)
        if saved:
            with fitting(where):
                self.state.load(saved)
        self._optimizer = accelerator.prepare(self.state.optimizer)
        self.samples = settings.batch * settings.accumulate * accelerator.num_processes
        """Samples of a step, of all processes."""
        sampler = ShardedSampler(
            saved.get("step", 0) * self.samples,
            settings.batch,
            accelerator.process_index,
            accelerator.num_processes,
        )
        self._batches = batches_on(accelerator.device, task.dataset(), settings, sampler)
        self._learn_from = (
            CapturedStep(self._learn, self.state.optimizer.zero_grad)
            if self._can_be_captured
            else self._learn
        )

    def __call__(self, rates: Mapping[str, float], step: int) -> dict[str, Tensor]:
        """Takes one step with the learning rate of each part; returns the losses of its last batch.

        The next step overwrites them.
        """
        self.state.set_rates(rates)
        for _ in range(self._settings.accumulate):
            losses = self._learn_from(next(self._batches))
        if self.state.ema is not None:
            self.state.ema.update(step)
        return losses

    def _learn(self, batch: Batch) -> dict[str, Tensor]:
        """Learns from a batch; waits for nothing, and copies nothing from the host."""
        accelerator, optimizer = self._accelerator, self._optimizer
        with accelerator.accumulate(self._module):
            with accelerator.autocast():
                losses = self._task.loss(self._module, batch)
            accelerator.backward(losses["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(self.state.trained, self._settings.clip)
            optimizer.step()
            optimizer.zero_grad()
        return {name: loss.detach() for name, loss in losses.items()}

    @property
    def _can_be_captured(self) -> bool:
        """Whether a step is always the same work on one card."""
        accelerator, settings = self._accelerator, self._settings
        alone = accelerator.num_processes == settings.accumulate == 1 and not settings.shard
        again = any(getattr(part, "gradient_checkpointing", False) for part in self._task.module.modules())
        return accelerator.device.type == "cuda" and alone and accelerator.scaler is None and not again


def _compiled(module: nn.Module) -> nn.Module:
    """Returns a module whose passes are compiled when they first run.

    Raises:
        InputError: there is nothing to compile with.
    """
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        raise InputError("compile needs a C++ compiler: install g++, or leave it out of the recipe")
    module.compile()
    return module


def batches_on(
    device: torch.device, dataset: AnyDataset, settings: LoopSettings, sampler: ShardedSampler
) -> Iterator[Batch]:
    """Makes a process's batches on a device: there, if the dataset can and it is a card, or if it must."""
    makes_samples = isinstance(dataset, NumberedDataset)
    if isinstance(dataset, DeviceDataset) and (device.type != "cpu" or not makes_samples):
        yield from (dataset.batch(numbers, device) for numbers in sampler.batches())
    elif isinstance(dataset, NumberedDataset):
        for batch in load_batches(dataset, settings, sampler):
            yield {name: value.to(device) for name, value in batch.items()}


def load_batches(
    dataset: NumberedDataset, settings: LoopSettings, sampler: ShardedSampler
) -> Iterator[dict[str, Tensor]]:
    """Loads a process's samples in batches, in `settings.workers` processes."""
    return load_samples(dataset, settings.batch, sampler, worker_count(settings.workers))
