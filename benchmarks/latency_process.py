"""What is measured, in a process of its own: this runtime on one backend, or the PyTorch pipeline.

`benchmarks/latency.py` starts it with a `Visit` as JSON and reads a line of JSON for every call that was
timed. It imports what it measures and nothing else, so that a cold start is what a user's would be.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import peak_memory_gb, reset_peak_memory
from engines.engine import Array, DeviceTensor
from engines.errors import AnyDoorError
from engines.spec import CONTROL, DECODE, DENOISE, ID_ENCODER
from runtime.diffusion.ddim import ddim_timesteps
from runtime.job import Composite
from runtime.request import Placement, Request, Sampling

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engines.engine import Engine

EXAMPLES = Path(__file__).parents[1] / "examples"

COLD = "cold start"
PICTURE = "picture"
REROLL = "re-roll"
SAMPLES = "samples of one placement"
BATCH = "different placements at once"
PROBE = "probe"
"""Only open it: can this be measured here?"""

PREPROCESSING, PASTE_BACK, LOAD, HOST = "pre-processing", "paste-back", "load", "host"
STAGES = (PREPROCESSING, ID_ENCODER, CONTROL, DENOISE, DECODE, PASTE_BACK, LOAD, HOST)
"""The stages of a picture; `load` brings graphs back that made room for others, and `host` is what the
sampling loop spends outside the graphs."""
PER_STEP = (CONTROL, DENOISE, HOST)
_SAMPLING_LOAD = "load while sampling"
_WARM_UP_STEPS = 3
"""Enough for a compiler to compile, to capture and to replay."""

ANYDOOR, PYTORCH, PEAK = "anydoor", "pytorch", "peak"


@dataclass(frozen=True)
class Subject:
    """What is measured."""

    kind: str
    """anydoor, pytorch, or peak for the machine's rates."""
    device: str = "cpu"
    dtype: str = "float32"
    """Of weights and activations; for the runtime fp32, fp16 (its bundle's) or bf16 (of inference alone)."""
    backend: str = ""
    bundle: str = ""
    """What the runtime runs, and on which backend."""
    compiled: bool = False
    """Whether PyTorch compiles."""

    @property
    def name(self) -> str:
        """As in the tables."""
        if self.kind == ANYDOOR:
            return f"anydoor, {self.backend}, {self.device}, {self.dtype}"
        how = "compiled" if self.compiled else "eager"
        return f"PyTorch {how}, {self.device}, {self.dtype}"

    @property
    def array_dtype(self) -> str:
        """`dtype` as NumPy and PyTorch name it."""
        # halves are computed in single precision on a CPU
        half = "float16" if self.device == "cuda" else "float32"
        return {"fp32": "float32", "bf16": "bfloat16", "fp16": half}.get(self.dtype, self.dtype)


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    steps: int = 50
    extra_steps: int = 50
    """Of re-rolls and batches."""
    cold_steps: int = 50
    rounds: int = 3
    """How often all subjects take their turn."""
    pictures: int = 3
    """Warm pictures per turn."""
    batch: bool = True
    """Whether different placements run together too."""
    extras_in: int = 3
    """In how many of the rounds re-rolls and batches are measured."""
    resolution: int = 512


@dataclass(frozen=True)
class Visit:
    """What one process does."""

    plan: Plan
    subject: Subject
    checkpoint: Path | None
    """What the bundle was built from; only PyTorch needs it."""
    threads: int
    samples: int
    """Pictures of a batch."""
    scenarios: tuple[str, ...]
    """What to measure besides a cold start and pictures."""
    guidance_scale: float
    started: float = 0.0
    """When the process was started, on the monotonic clock that all processes share."""
    picture: Path | None = None
    """Where to leave the first warm picture."""

    def to_json(self) -> str:
        """The argument of the process."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Visit:
        """What `to_json` wrote."""
        content = json.loads(text)
        content["plan"] = Plan(**content["plan"])
        content["subject"] = Subject(**content["subject"])
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


class Pipeline(Protocol):
    """What both ways of compositing look like here."""

    latent_shape: tuple[int, int, int]
    """(C, h, w)."""
    synchronous: bool
    """Whether stages are waited for, so that their times can be told apart."""

    def run(
        self, scene: Any, placements: Sequence[Placement], noise: NDArray[np.float32], sampling: Sampling
    ) -> list[Composite]:
        """See `benchmarks.pytorch_pipeline.PyTorchPipeline.run`."""


class TimedEngine:
    """An engine that notes how long the calls of each graph take; see `engines.engine.Engine`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.wait = engine.device == "cpu"
        """Wait for every call; a card goes on working when a call returns."""
        self.seconds: dict[str, float] = {}
        """Graph -> seconds of its calls; and of loading graphs before a call, in all and while sampling."""

    def run(
        self, graph: str, inputs: Mapping[str, DeviceTensor | Array], outputs: Sequence[str] | None = None
    ) -> dict[str, DeviceTensor]:
        """Runs a graph."""
        return self._timed(graph, self._engine.run, inputs, outputs)

    def run_steps(self, graph: str, *arguments: Any) -> dict[str, DeviceTensor]:
        """Runs a graph several times."""
        return self._timed(graph, self._engine.run_steps, *arguments)

    def _timed(
        self, graph: str, run: Callable[..., dict[str, DeviceTensor]], *arguments: Any
    ) -> dict[str, DeviceTensor]:
        started = time.perf_counter()
        # apart: where graphs take turns, a call that loads first says nothing about the next one
        self._engine.load(graph)
        loaded = time.perf_counter()
        self._note(LOAD, loaded - started)
        if graph in (CONTROL, DENOISE):
            self._note(_SAMPLING_LOAD, loaded - started)
        results = run(graph, *arguments)
        if self.wait and self._engine.device != "cpu":
            self._engine.to_host(min(results.values(), key=self._engine.nbytes))
        self._note(graph, time.perf_counter() - loaded)
        return results

    def _note(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


class AnyDoorPipeline:
    """The runtime."""

    def __init__(self, visit: Visit) -> None:
        from engines.bundle import Bundle
        from engines.engine import open_engine
        from runtime.compositor import Compositor

        subject = visit.subject
        bundle = Bundle.open(subject.bundle)
        engine = open_engine(
            bundle,
            subject.device,
            visit.threads,
            backend=subject.backend,
            inference_precision="bf16" if subject.dtype == "bf16" else "fp32",
        )
        self._engine = TimedEngine(engine)
        self._compositor = Compositor(bundle, self._engine)  # type: ignore[arg-type]
        self.latent_shape = self._compositor.latent_shape

    @property
    def synchronous(self) -> bool:
        """See `Pipeline`."""
        return self._engine.wait

    @synchronous.setter
    def synchronous(self, wait: bool) -> None:
        self._engine.wait = wait

    def run(
        self, scene: Any, placements: Sequence[Placement], noise: NDArray[np.float32], sampling: Sampling
    ) -> list[Composite]:
        """See `Pipeline`."""
        self._engine.seconds = {}
        if len(placements) == 1:
            results = self._compositor.run(
                scene, placements[0], sampling=sampling, num_images=len(noise), initial_noise=noise
            )
        else:
            results = self._run_together(scene, placements, noise, sampling)
        for result in results:
            result.seconds.update(self._engine.seconds)
        return results

    def _run_together(
        self, scene: Any, placements: Sequence[Placement], noise: NDArray[np.float32], sampling: Sampling
    ) -> list[Composite]:
        """As the server does with requests that arrive together: every step of all is one call."""
        compositor = self._compositor
        jobs = [
            compositor.accept(Request(scene, [placement], None, sampling, 1, noise[index : index + 1]))
            for index, placement in enumerate(placements)
        ]
        canvases = [job.canvases[0] for job in jobs]
        batch = compositor.new_batch()
        for canvas in canvases:
            canvas.prepare()
            batch.samples.append(compositor.start(canvas))
        watch = jobs[0].watch
        for _ in range(sampling.steps):
            with watch.measure("sample"):
                batch.step()
        for error in (sample.error for sample in batch.samples if sample.error):
            raise error
        for canvas, sample in zip(canvases, batch.samples):
            canvas.paste(compositor.decode(batch.latents([sample])))
        for job in jobs[1:]:
            for stage, seconds in job.watch.seconds.items():
                watch.add(stage, seconds)
        return [job.results()[0] for job in jobs]


def open_pipeline(visit: Visit) -> Pipeline:
    """What the visit measures, ready to use."""
    if visit.subject.kind == ANYDOOR:
        return AnyDoorPipeline(visit)
    import torch

    from benchmarks.pytorch_pipeline import PyTorchPipeline

    torch.set_num_threads(visit.threads)
    subject = visit.subject
    assert visit.checkpoint is not None
    return PyTorchPipeline(
        visit.checkpoint, visit.plan.resolution, subject.device, subject.dtype, subject.compiled
    )


def stages_of(seconds: Mapping[str, float]) -> dict[str, float]:
    """Stage -> seconds, from what stopwatch and engine noted."""
    graphs = {graph: seconds.get(graph, 0.0) for graph in (ID_ENCODER, CONTROL, DENOISE, DECODE)}
    inside = graphs[CONTROL] + graphs[DENOISE] + seconds.get(_SAMPLING_LOAD, 0.0)
    return {
        PREPROCESSING: seconds.get("read", 0.0) + seconds.get("prepare", 0.0),
        **graphs,
        PASTE_BACK: seconds.get("paste", 0.0),
        LOAD: seconds.get(LOAD, 0.0),
        HOST: max(seconds.get("sample", 0.0) - inside, 0.0),
    }


def placement(variant: int) -> Placement:
    """The example's object at its place, `variant` levels brighter: nothing kept fits another variant."""
    from PIL import Image

    box = tuple(int(v) for v in (EXAMPLES / "scene_box.txt").read_text("utf-8").split(","))
    rgba = np.asarray(Image.open(EXAMPLES / "object.png").convert("RGBA")).astype(np.int16)
    rgba[..., :3] = np.minimum(rgba[..., :3] + variant, 255)
    return Placement(rgba.astype(np.uint8), box=box)  # type: ignore[arg-type]


class Stand:
    """Takes a pipeline through the scenarios."""

    def __init__(self, visit: Visit, pipeline: Pipeline) -> None:
        self._visit = visit
        self._pipeline = pipeline
        # on a card the times of the stages come from calls of their own, slowed down by waiting
        self._waits = (True,) if pipeline.synchronous else (False, True)
        self._variant = 0

    def calls(self) -> Iterator[Call]:
        """All calls of the visit, as they are done; the cold start first."""
        visit, plan = self._visit, self._visit.plan
        yield self._cold()
        for _ in range(plan.pictures):
            yield from self._calls(PICTURE, plan.steps, 1, fresh=1)
            if REROLL in visit.scenarios:
                yield from self._calls(REROLL, plan.extra_steps, 1, fresh=0)
        if visit.subject.compiled and (SAMPLES in visit.scenarios or BATCH in visit.scenarios):
            # another batch is another program; compiling it is not what is measured
            inputs = self._inputs(self._new_variants(visit.samples), visit.samples, _WARM_UP_STEPS)
            self._pipeline.run(*inputs)
        if SAMPLES in visit.scenarios:
            yield from self._calls(SAMPLES, plan.extra_steps, visit.samples, fresh=1)
        if BATCH in visit.scenarios:
            yield from self._calls(BATCH, plan.extra_steps, visit.samples, fresh=visit.samples)

    def _new_variants(self, count: int) -> list[int]:
        self._variant += count
        return list(range(self._variant - count + 1, self._variant + 1))

    def _calls(self, scenario: str, steps: int, count: int, fresh: int) -> Iterator[Call]:
        """A scenario once, or once as it is and once waited for.

        Args:
            scenario: its name.
            steps: of each picture.
            count: of pictures.
            fresh: how many placements that were not seen before; the last one again if 0.
        """
        for wait in self._waits:
            self._pipeline.synchronous = wait
            variants = self._new_variants(fresh) if fresh else [self._variant]
            yield self._call(scenario, steps, variants, count)

    def _cold(self) -> Call:
        self._pipeline.run(*self._inputs([0], 1, self._visit.plan.cold_steps))
        seconds = time.monotonic() - self._visit.started
        return Call(COLD, self._visit.plan.cold_steps, 1, self._visit.started, seconds, {}, _peak())

    def _call(self, scenario: str, steps: int, variants: Sequence[int], count: int) -> Call:
        inputs = self._inputs(variants, count, steps, reroll=scenario == REROLL)
        with suppress(OSError):
            reset_peak_memory()
        started = time.monotonic()
        results = self._pipeline.run(*inputs)
        seconds = time.monotonic() - started
        stages = stages_of(results[0].seconds) if self._pipeline.synchronous else {}
        if scenario == PICTURE and variants == [1] and self._visit.picture:
            region = results[0].regions[0]
            np.save(self._visit.picture, results[0].image[region.slices])
        return Call(scenario, steps, count, started, seconds, stages, _peak())

    def _inputs(
        self, variants: Sequence[int], count: int, steps: int, reroll: bool = False
    ) -> tuple[Path, list[Placement], NDArray[np.float32], Sampling]:
        shape = (count, *self._pipeline.latent_shape)
        noise = np.random.default_rng(int(reroll)).standard_normal(shape, dtype=np.float32)
        # a shorter re-roll visits timesteps that the picture before it visited
        timesteps = tuple(ddim_timesteps(self._visit.plan.steps)[-steps:].tolist()) if reroll else None
        sampling = Sampling(steps=steps, guidance_scale=self._visit.guidance_scale, timesteps=timesteps)
        return EXAMPLES / "scene.png", [placement(v) for v in variants], noise, sampling


def _peak() -> float | None:
    try:
        return peak_memory_gb()
    except OSError:
        return None


def main(arguments: Sequence[str]) -> int:
    """Prints a line of JSON per call; the last line of stderr says what went wrong, if something did."""
    # when memory runs out, this process is the one to end
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    visit = Visit.from_json(arguments[0])
    if visit.subject.kind == PEAK:
        from benchmarks.roofline import measure_peak

        found = measure_peak(visit.threads, visit.subject.device, visit.subject.dtype)
        print(json.dumps(asdict(found)), flush=True)
        return 0
    try:
        pipeline = open_pipeline(visit)
        if PROBE in visit.scenarios:
            return 0
        for call in Stand(visit, pipeline).calls():
            print(json.dumps(asdict(call)), flush=True)
    except AnyDoorError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
