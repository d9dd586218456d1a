"""How an engine is opened: one set of options for the command line, the server, the Compositor and
benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engines.errors import BackendError
from engines.registry import backends

AUTO = "auto"

BACKENDS = (AUTO, *backends())

DEVICES = (AUTO, "cpu", "cuda")

INFERENCE_PRECISIONS = ("fp32", "tf32", "bf16")


def _option(default: Any, help: str, **flag: Any) -> Any:
    """A field, with what a command line says of it."""
    return field(default=default, metadata={"help": help, **flag})


@dataclass(frozen=True)
class EngineOptions:
    """Where and how the graphs of a bundle run."""

    backend: str = _option(
        AUTO, "what executes the graphs; auto: the fastest that is installed", choices=BACKENDS
    )
    device: str = _option(AUTO, "where the graphs run; auto: the best of this machine", choices=DEVICES)
    inference_precision: str = _option(
        "fp32",
        "of graphs that are in float32; tf32 on cards, bf16 where the processor has it",
        choices=INFERENCE_PRECISIONS,
    )
    threads: int | None = _option(None, "CPU threads of one operator; all cores if unset", metavar="N")
    memory_budget: int | None = _option(
        None,
        "of the device's memory to use at most, like 6G; nearly all that is free if unset",
        metavar="SIZE",
        is_size=True,
    )
    cuda_graphs: bool = _option(
        True, "on a card, capture the graphs that run for every picture as CUDA graphs and replay them"
    )

    def __post_init__(self) -> None:
        """Refuses values that no engine has.

        Raises:
            BackendError: names the option and its values.
        """
        for what, chosen, known in (
            ("backend", self.backend, BACKENDS),
            ("device", self.device, DEVICES),
            ("inference precision", self.inference_precision, INFERENCE_PRECISIONS),
        ):
            if chosen not in known:
                raise BackendError(f"there is no {what} '{chosen}': choose one of {', '.join(known)}")
        for what, number, least in (("threads", self.threads, 1), ("memory_budget", self.memory_budget, 1)):
            if number is not None and number < least:
                raise BackendError(f"{what} must be at least {least}, not {number}")
