"""How a bundle is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engines.errors import AnyDoorError
from engines.manifest import ANY_TARGET, CUDA
from engines.registry import backends

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
    resolution: int = 512
    """Side of the generated picture, in pixels."""
    targets: tuple[str, ...] = ()
    """GPU architectures of plans, like sm89; what suits the library if empty. Of ONNX graphs `CUDA`, for the
    operators of ONNX Runtime's CUDA provider, or any."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Parameters for the manifest's `defaults`, beside those of the checkpoint."""

    deterministic: bool = False
    """Of graphs for `CUDA`: the same input gives the same bits."""

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
                f"--targets of {ONNX} is {ANY_TARGET} or {CUDA}: architectures go with --backend tensorrt_rtx"
            )
        if self.deterministic and self.targets != (CUDA,):
            raise AnyDoorError(f"--deterministic goes with --backend {ONNX} --targets {CUDA}")
        if self.max_batch < 1:
            raise AnyDoorError(f"--max-batch must be at least 1, not {self.max_batch}")
