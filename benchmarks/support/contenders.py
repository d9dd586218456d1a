"""What latency.py measures: contenders, scenarios, stages, and how much of each."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.support import graphs

COLD = "cold start"
PICTURE = "picture"
REROLL = "re-roll"
SAMPLES = "samples of one placement"
BATCH = "different placements at once"
PROBE = "probe"
"""Only open it, to find out whether it can be measured here."""

PREPROCESSING, PASTE_BACK, LOAD, HOST = "pre-processing", "paste-back", "load", "host"
STAGES = {
    system: (PREPROCESSING, *names, PASTE_BACK, LOAD, HOST) for system, names in graphs.GRAPHS_OF.items()
}
"""System -> the stages of a picture. `load` is loading graphs again where the memory plan swaps them; `host`
is the time of the sampling loop outside the graphs."""
PER_STEP = (*graphs.PER_STEP, HOST)
"""The stages that every step has."""

ANYDOOR, PYTORCH, PEAK = "anydoor", "pytorch", "peak"


@dataclass(frozen=True)
class Contender:
    """One of the ways to make a picture that are compared."""

    kind: str
    """anydoor, pytorch, or peak for the machine's rates."""
    device: str = "cpu"
    precision: str = "fp32"
    """fp32, fp16 or bf16, of weights and activations. The runtime's fp16 is that of the bundle, its bf16 that
    of inference alone."""
    backend: str = ""
    """What executes the graphs; only the runtime has one."""
    bundle: str = ""
    """What the runtime opens; it also says which network PyTorch runs where there is no checkpoint."""
    compiled: bool = False
    """Whether PyTorch compiles."""

    @property
    def name(self) -> str:
        """As in the tables."""
        if self.kind == ANYDOOR:
            return f"anydoor, {self.backend}, {self.device}, {self.precision}"
        how = "compiled" if self.compiled else "eager"
        return f"PyTorch {how}, {self.device}, {self.precision}"

    @property
    def product_precision(self) -> str:
        """The precision that matrix products are computed in."""
        # on a CPU the backends convert FP16 to FP32 first
        converted = self.kind == ANYDOOR and self.device == "cpu" and self.precision == "fp16"
        return "fp32" if converted else self.precision


@dataclass(frozen=True)
class Workload:
    """How much is measured."""

    steps: int = 50
    extra_steps: int = 50
    """Of re-rolls and batches."""
    cold_steps: int = 50
    rounds: int = 3
    """Turns of every contender."""
    pictures: int = 3
    """Warm pictures per turn."""
    batch: bool = True
    """Whether different placements run together too."""
    extras_in: int = 3
    """Rounds in which re-rolls and batches are measured."""
    resolution: int = 512


@dataclass(frozen=True)
class Run:
    """What one process measures."""

    workload: Workload
    contender: Contender
    checkpoint: Path | None
    """What the bundle was built from, for PyTorch: a file, or of Stable Diffusion a folder; if None, PyTorch
    runs the bundle's network with noise."""
    threads: int
    samples: int
    """Pictures of a batch."""
    scenarios: tuple[str, ...]
    """What to measure besides a cold start and pictures."""
    guidance_scale: float
    system: str = "anydoor"
    started: float = 0.0
    """When the process was started, on the monotonic clock, which all processes share."""
    picture: Path | None = None
    """Where to write the first warm picture."""

    def to_json(self) -> str:
        """Return the argument of the process."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Run:
        """Read what `to_json` returned."""
        content = json.loads(text)
        content["workload"] = Workload(**content["workload"])
        content["contender"] = Contender(**content["contender"])
        content["scenarios"] = tuple(content["scenarios"])
        for name in ("checkpoint", "picture"):
            content[name] = Path(content[name]) if content[name] else None
        return cls(**content)


@dataclass(frozen=True)
class Call:
    """One call that was timed."""

    scenario: str
    steps: int
    pictures: int
    started: float
    """On the monotonic clock."""
    seconds: float
    stages: dict[str, float]
    """Stage -> seconds, of all pictures together; empty where stages were not waited for."""
    peak_gb: float | None
    """Largest resident memory during the call."""
    rows: dict[str, int] = field(default_factory=dict)
    """Graph -> rows that it evaluated; empty for PyTorch."""
