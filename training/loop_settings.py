"""Defines a recipe's settings of a stage's loop: steps, rates and precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from runtime.errors import InputError
from training.clock import TimeLimit
from training.ranges import check_least

Precision = Literal["no", "auto", "bf16", "fp16"]
OptimizerName = Literal["adamw", "muon"]


@dataclass(frozen=True)
class LoopSettings:
    """How long and how fast to train."""

    steps: int
    batch: int = 16
    """Samples per process and forward pass."""
    accumulate: int = 1
    """Forward passes per step."""
    optimizer: OptimizerName = "adamw"
    """'muon' is for networks that start from nothing: see `training.muon`."""
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
    """'no' (fp32), 'bf16' or 'fp16', as Accelerate names them, or 'auto': bf16 where the device computes in
    it, else fp32; on cards it also allows TF32. Weights, their average, the optimizer and losses are fp32."""
    compile: bool = False
    """Whether a processor's steps are compiled: about 1.3 times as fast for the small models, after minutes
    of compiling. A card replays a captured step instead."""
    minutes: float = 0.0
    """Weight of the stage when stages share the minutes of `training.train --minutes`; 0 for no limit."""
    limit: TimeLimit | None = field(default=None, metadata={"key": None})
    """The stage's share of them. It ends in time, after `steps` at the latest, and its schedule goes by steps
    or by time, whichever is further."""
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
        if not 0 <= self.minutes < math.inf:
            raise InputError(f"minutes is {self.minutes:g}; expected a share of --minutes, at least 0")
        check_least(self, 1, "steps", "batch", "accumulate", "save_every", "draw_every", "log_every")
        check_least(self, 0, "warmup", "weight_decay", "final_rate")
        for rate in (self.learning_rate, *self.rates.values()):
            if not 0 <= rate < math.inf:
                raise InputError(f"a learning rate is {rate:g}; expected at least 0")
        if self.optimizer == "muon" and self.shard:
            raise InputError("optimizer 'muon' needs whole matrices: leave out shard, or take 'adamw'")
        if self.optimizer == "muon" and self.precision == "fp16":
            # GradScaler leaves it to AdamW's fused kernel to skip a step whose gradients overflowed
            raise InputError("optimizer 'muon' is not for precision 'fp16': take 'bf16', 'auto' or 'adamw'")
        if not self.clip > 0:
            raise InputError(f"clip is {self.clip:g}; expected more than 0")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema is {self.ema:g}; expected a decay from 0 to below 1")
        if not 0 < self.swap <= 1 or (self.swap < 1 and len(self.rates) != 2):
            raise InputError(
                f"swap is {self.swap:g} with {len(self.rates)} rates; expected a share of the steps, above 0 "
                "and at most 1, and two rates to exchange"
            )

    @property
    def swap_step(self) -> int:
        """How many steps are done when two parts exchange their rates."""
        return math.ceil(round(self.swap * self.steps, 6))  # 0.55 of 100 is a little more than 55

    def part_rate(self, part: str, step: int, progress: float = 0.0) -> float:
        """Gives the learning rate of a part at a step, warm-up, decay and exchange included.

        `progress`: the share of the time limit that is over.
        """
        rates = self.rates
        if self.swap < 1 and (self.swap_step <= step or self.swap <= progress):
            rates = dict(zip(rates, reversed(list(rates.values())), strict=True))
        return rates.get(part, self.learning_rate) * self.rate(step, progress)

    def rate(self, step: int, progress: float = 0.0) -> float:
        """Gives the factor on the learning rate at a step: a linear warm-up, then a cosine."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        by_steps = min((step - self.warmup) / max(self.steps - self.warmup, 1), 1.0)
        over = max(by_steps, progress)
        return self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * over))
