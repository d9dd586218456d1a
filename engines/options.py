"""Defines the options of an engine, for the command line, the server, the Compositor and benchmarks."""

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
    """Returns a field, with its help text for the command line."""
    return field(default=default, metadata={"help": help, **flag})


@dataclass(frozen=True)
class EngineOptions:
    """Options for running the graphs of a bundle."""

    backend: str = _option(
        AUTO, "library that runs the graphs; auto: the fastest installed one", choices=BACKENDS
    )
    device: str = _option(AUTO, "device that runs the graphs; auto: a card if there is one", choices=DEVICES)
    inference_precision: str = _option(
        "fp32",
        "precision of float32 graphs; tf32 needs a card, bf16 a processor with bfloat16 arithmetic",
        choices=INFERENCE_PRECISIONS,
    )
    threads: int | None = _option(None, "CPU threads per operator (default: all cores)", metavar="N")
    memory_budget: int | None = _option(
        None,
        "most memory to use on the device, like 6G (default: 90 %% of what is free)",
        metavar="SIZE",
        is_size=True,
    )
    cuda_graphs: bool = _option(True, "on a card, capture graphs as CUDA graphs and replay them")

    def __post_init__(self) -> None:
        """Checks all values.

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
