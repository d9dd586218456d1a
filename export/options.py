"""Defines the options of a build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from engines.errors import AnyDoorError
from engines.manifest import ANY_TARGET, CUDA
from engines.registry import backends
from engines.schema import LARGEST_BATCH

ONNX = "onnxruntime"
"""Backend of bundles of ONNX graphs."""

BACKENDS = tuple(dict.fromkeys(backend.runs for backend in backends().values()))

DETERMINISTIC_CUDA = "deterministic cuda"
"""Rules for `CUDA` that leave out what adds in no fixed order; see `BuildOptions.rules`."""

PRECISIONS = ("fp32", "fp16")


@dataclass(frozen=True)
class BuildOptions:
    """How a bundle is built."""

    backend: str = ONNX
    precision: str = "fp32"
    max_batch: int = 4
    """Most samples in one call."""
    resolution: int | tuple[int, int] = 512
    """Side of the generated picture, or its (height, width), in pixels."""
    targets: tuple[str, ...] = ()
    """GPU architectures of plans, like sm89; what suits the library if empty. Of ONNX graphs `CUDA`, for the
    operators of ONNX Runtime's CUDA provider, or any."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Parameters for the manifest's `defaults`, beside those of the checkpoint."""

    deterministic: bool = False
    """For graphs of the target `CUDA`: the same input gives the same bits."""

    reuse: Path | None = None
    """A bundle whose graphs are copied, those that are made from the same."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the generated picture, in pixels."""
        return self.resolution if isinstance(self.resolution, tuple) else (self.resolution, self.resolution)

    @property
    def rules(self) -> str:
        """Which of `export.rewrite.targets` the graphs of an ONNX bundle are rewritten for."""
        if self.deterministic:
            return DETERMINISTIC_CUDA
        return CUDA if CUDA in self.targets else ANY_TARGET

    def __post_init__(self) -> None:
        """Refuses values that no build has.

        Raises:
            AnyDoorError: names the option.
        """
        for what, chosen, known in (
            ("backend", self.backend, BACKENDS),
            ("precision", self.precision, PRECISIONS),
        ):
            if chosen not in known:
                raise AnyDoorError(f"there is no {what} '{chosen}': choose one of {', '.join(known)}")
        if self.backend == ONNX and self.targets not in ((), (ANY_TARGET,), (CUDA,)):
            raise AnyDoorError(
                f"--targets of {ONNX} is {ANY_TARGET} or {CUDA}: architectures are for --backend tensorrt_rtx"
            )
        if self.deterministic and self.targets != (CUDA,):
            raise AnyDoorError(f"--deterministic needs --backend {ONNX} --targets {CUDA}")
        if self.reuse is not None and self.rules != ANY_TARGET:
            raise AnyDoorError(f"--reuse needs --targets {ANY_TARGET}: graphs for {CUDA} are not copied")
        if not 1 <= self.max_batch <= LARGEST_BATCH:
            raise AnyDoorError(f"--max-batch must be from 1 to {LARGEST_BATCH}, not {self.max_batch}")


@dataclass(frozen=True)
class SourceOptions:
    """What a checkpoint does not say of itself, and what goes into it. A system takes some of them."""

    unet_head_width: int | None = None
    """Channels per attention head of the UNet."""
    dino_heads: int | None = None
    """Attention heads of the ID encoder."""
    references: int | None = None
    """Most pictures of an object that a placement may have."""
    ema: bool | None = None
    """Whether to take the averages of weights, of those that have one."""
    variant: str | None = None
    """Variant of a folder's weights, like fp16."""
    prediction: str | None = None
    """What the UNet predicts: epsilon or v."""
    tokenizer: Path | None = None
    """merges.txt, or the folder of a tokenizer."""
    lora: tuple[tuple[Path, float], ...] | None = None
    """Files to merge, and how much of each, in order."""

    def require(self, system: str, *taken: str) -> None:
        """Refuses options that a system does not take.

        Args:
            system: what the checkpoint is, for people.
            taken: names of the options that go with it.

        Raises:
            AnyDoorError: names the first other one.
        """
        for name in SOURCE_OPTIONS:
            if getattr(self, name) is not None and name not in taken:
                flags = ", ".join(map(flag, taken))
                raise AnyDoorError(f"{flag(name)} is not for {system}, which takes {flags}")

    def __post_init__(self) -> None:
        """Refuses numbers that no network has.

        Raises:
            AnyDoorError: names the option.
        """
        for name in ("unet_head_width", "dino_heads", "references"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise AnyDoorError(f"{flag(name)} must be at least 1, not {value}")


NOTHING_GIVEN = SourceOptions()

SOURCE_OPTIONS = tuple(field.name for field in fields(SourceOptions))


def flag(name: str) -> str:
    """Returns the flag of an option."""
    return f"--{name.replace('_', '-')}"
