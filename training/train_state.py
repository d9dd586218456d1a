"""Holds the state of a training stage between steps, saves it and reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from engines.files import replacing
from runtime.errors import InputError
from training.loop_settings import LoopSettings
from training.muon import MOMENTUM_STATE, MuonAdamW, hidden_matrices
from training.sharding import gather, shard, to_local


class EMA:
    """Exponential moving average of the trained weights."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.weights = {name: weight.detach().clone() for name, weight in self._trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the weights; faster early on, so that it forgets the random start."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = ([to_local(w) for w in of.values()] for of in (self.weights, self._trained))
        torch._foreach_lerp_(averages, weights, 1 - decay)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Goes on from an average that was saved."""
        self.weights = {name: shard(weights[name], like) for name, like in self.weights.items()}

    def state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        """Gives the module's state with the average in place of the trained weights."""
        return {**module.state_dict(), **self.weights}


def save_atomically(state: Any, path: Path) -> None:
    """Writes a file that `read_state` reads; a kill never leaves half of one."""
    with replacing(path) as partial:
        torch.save(state, partial)


def read_state(path: Path) -> dict[str, Any]:
    """Reads what `TrainState.save` wrote to go on from; empty if there is nothing.

    Raises:
        InputError, OSError: see `read_tensors`.
    """
    return read_tensors(path) if path.exists() else {}


def read_tensors(path: Path) -> dict[str, Any]:
    """Reads a table of tensors that `save_atomically` wrote.

    Raises:
        InputError: it is damaged.
        OSError: it cannot be read.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the unpickler stumbles in many ways
        raise InputError(_damaged(path)) from error
    if not isinstance(content, dict):
        raise InputError(_damaged(path))
    return content


def _damaged(path: Path) -> str:
    return f"'{path}' is damaged: delete '{path.parent}' to run the stage '{path.parent.name}' anew"


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Refuses what a file holds if the block cannot put it where the recipe has its place.

    Raises:
        InputError: names the file.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"'{path}' does not fit what the recipe describes: give another --folder, or delete "
            f"'{path.parent}' to run the stage '{path.parent.name}' anew"
        ) from error


def parts_to_train(module: nn.Module, rates: Mapping[str, float]) -> dict[str, list[nn.Parameter]]:
    """Groups the weights that learn: one group per part with a rate of its own, "" for all others.

    Raises:
        InputError: nothing learns, or a rate is for a part that does not exist, or does not learn.
    """
    groups: dict[str, list[nn.Parameter]] = {}
    for name, weight in module.named_parameters():
        if weight.requires_grad:
            part = name.partition(".")[0]
            groups.setdefault(part if part in rates else "", []).append(weight)
    if not groups:
        raise InputError("the recipe has no part of the network learn: switch one on, or leave the stage out")
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
        """Takes a module that is where it learns.

        `scaler` keeps the gradients of fp16 from vanishing; other precisions have none.
        """
        self.module, self.scaler = module, scaler
        groups = parts_to_train(module, settings.rates)
        self.parts = list(groups)
        """Those with rates of their own, and "" if there are others: the optimizer's groups."""
        self.trained = [weight for weights in groups.values() for weight in weights]
        first = self.trained[0]
        self.device = first.device
        # the fused kernels, and rates on the card: a step that is captured reads them anew each time
        on_card = first.is_cuda and not isinstance(first, DTensor)
        matrices = hidden_matrices(module.named_parameters()) if settings.optimizer == "muon" else []
        self.optimizer = MuonAdamW(
            [
                {"params": weights, **({"lr": torch.zeros((), device=self.device)} if on_card else {})}
                for weights in groups.values()
            ],
            matrices,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=on_card or None,
            capturable=on_card,
        )
        self.ema = EMA(module, settings.ema) if settings.ema else None

    def set_rates(self, rates: Mapping[str, float]) -> None:
        """Sets the learning rate of each part."""
        for group, part in zip(self.optimizer.param_groups, self.parts, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rates[part])
            else:
                group["lr"] = rates[part]

    def weights(self) -> dict[str, Tensor]:
        """Gives the weights to use, on the CPU: their average if there is one, else the last ones."""
        return gather(self.ema.state_dict(self.module) if self.ema else self.module.state_dict())

    def save(self, step: int, seconds: float, folder: Path | None) -> None:
        """Writes mean.pt, to use, and last.pt, to go on from; any machine can read them.

        Every process must call it, because each may hold a part; the one with a folder writes.

        Args:
            step: how many are done.
            seconds: how long they took.
            folder: of the files; None writes none.
        """
        state: dict[str, Any] = {"step": step, "seconds": seconds, "device": self.device.type}
        state["module"] = gather(self.module.state_dict())
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

    def load(self, saved: Mapping[str, Any]) -> None:
        """Goes on from what `save` wrote, each process with its part.

        The module has its weights already (see `saved_weights`).
        """
        if self.ema is not None and "mean" in saved:
            self.ema.load(saved["mean"])
        if saved.get("device", "cpu") != self.device.type:
            return
        moments = saved["optimizer"]["state"]
        if any(
            (MOMENTUM_STATE in moments[n]) != (self.trained[n] in self.optimizer.matrices) for n in moments
        ):
            raise LookupError("the moments are of another optimizer")
        for index, values in moments.items():
            for name, value in values.items():
                if name != "step":  # the others are moments of the gradient
                    values[name] = shard(value, self.trained[index])
        # the groups are what the recipe says
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if self.scaler is not None and "scaler" in saved:
            self.scaler.load_state_dict(saved["scaler"])


def saved_weights(saved: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Gives the weights to go on with: the last ones, or, from another kind of device, their average.

    The moments of the gradient start anew there, and the average is what is sure to be good without them.
    """
    same = saved.get("device", "cpu") == device.type
    return {**saved["module"], **({} if same else saved.get("mean", {}))}
