"""Composites pairs of the synthetic set with many sampling settings, and compares them with `exact`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.support.graphs import CONTROL, DENOISE, ROW_INPUTS
from benchmarks.support.identity import Gallery, identity_of
from benchmarks.support.similarity import region_psnr, region_ssim
from benchmarks.support.truth_set import TruthPair
from runtime import Compositor, Request, Sampling
from runtime.diffusion.presets import QUALITIES

Picture = NDArray[np.uint8]

EXACT = "exact"
OTHER_SEED = "exact, other seed"
_SEED_OFFSET = 1_000_000


@dataclass(frozen=True)
class Setting:
    """What is changed, and one value of it."""

    name: str
    lever: str
    """What is changed: the settings of one lever are one line of the plot."""
    sampling: Sampling
    seed_offset: int = 0


def settings(guidance_scale: float | None, parameters: Collection[str]) -> list[Setting]:
    """Return everything that is measured; `exact` is the first.

    Presets are given as the parameters that they set: a model may not offer them before they are measured.

    Args:
        guidance_scale: of all settings; the model's if None.
        parameters: those that the model has.
    """
    exact = Sampling(quality=EXACT, guidance_scale=guidance_scale)

    def lever(name: str, label: str, field: str, values: Sequence[Any], **fixed: Any) -> Iterator[Setting]:
        for value in values:
            text = "-".join(map(str, value)) if isinstance(value, tuple) else value
            yield Setting(f"{label} {text}", name, replace(exact, **{field: value}, **fixed))

    def preset(name: str) -> Setting:
        values = {field: value for field, value in QUALITIES[name].items() if field in parameters}
        return Setting(name, "presets", replace(exact, **values))

    steps = (25, 20, 16, 12, 8)
    second_order = "dpm_solver_2m"
    return [
        Setting(EXACT, EXACT, exact),
        Setting(OTHER_SEED, "seed", exact, _SEED_OFFSET),
        *lever("DDIM, fewer steps", "ddim", "steps", steps),
        *lever(f"{second_order}, fewer steps", second_order, "steps", steps, sampler=second_order),
        *lever("guidance interval", "guided", "guidance_interval", ((200, 999), (400, 999), (200, 800))),
        *(lever("map timesteps", "maps", "map_steps", (25, 10, 5, 3)) if "map_steps" in parameters else ()),
        *(preset(name) for name in QUALITIES if name != EXACT),
    ]


class RowCounter:
    """An engine's observer that counts the rows that UNet and ControlNet evaluate."""

    def __init__(self) -> None:
        self.rows = dict.fromkeys(ROW_INPUTS, 0)
        """Graph -> rows since the last reset."""

    def reset(self) -> None:
        """Count from 0."""
        self.rows = dict.fromkeys(ROW_INPUTS, 0)

    def __call__(self, action: str, graph: str, inputs: Mapping[str, Any]) -> AbstractContextManager[object]:
        """Count the rows of a run."""
        if action == "run" and graph in ROW_INPUTS:
            # an engine that takes several steps at once is given the values of all of them
            self.rows[graph] += int(np.size(inputs[ROW_INPUTS[graph]]))
        return nullcontext()


@dataclass(frozen=True)
class Trial:
    """One pair composited with one setting."""

    seconds: float
    processor_seconds: float
    """Of all threads; other programs do not count."""
    unet_rows: int
    control_rows: int
    ssim: float
    """Against the truth, in the object's box."""
    psnr: float
    """dB, of the same."""
    recognised: bool | None
    change: float
    """Root mean square of the pixels' difference to `exact` in the drawn region, in levels of 255."""


@dataclass(frozen=True)
class _Composited:
    picture: Picture
    seconds: float
    processor_seconds: float
    rows: Mapping[str, int]


class TrialRunner:
    """Composites pairs with all settings."""

    def __init__(self, compositor: Compositor, mode: str | None, seed: int, gallery: Gallery | None) -> None:
        """Observe the compositor's engine.

        Args:
            compositor: nothing else may use it.
            mode: of the placements; the model's if None.
            seed: of the first pair.
            gallery: what objects are recognised among; None to leave recognition out.
        """
        self._compositor, self._mode, self._seed, self._gallery = compositor, mode, seed, gallery
        self._counter = RowCounter()
        compositor.engine.observer = self._counter

    def run(
        self, pair: TruthPair, number: int, todo: Sequence[Setting], advance: Callable[[], object]
    ) -> list[Trial]:
        """Composite a pair with all settings; each pair begins with another one.

        Args:
            pair: what is composited.
            number: of the pair.
            todo: the settings, `exact` first.
            advance: called after each composite.

        Returns:
            One trial per setting.
        """
        composited: dict[int, _Composited] = {}
        start = number % len(todo)
        for index in (*range(start, len(todo)), *range(start)):
            composited[index] = self._composite(pair, number, todo[index])
            advance()
        exact = composited[0].picture
        return [self._compare(pair, exact, composited[index]) for index in range(len(todo))]

    def _composite(self, pair: TruthPair, number: int, setting: Setting) -> _Composited:
        self._compositor.clear()
        self._counter.reset()
        seed = self._seed + number + setting.seed_offset
        started, processor_started = time.perf_counter(), time.process_time()
        request = Request(pair.guessed, [pair.placement(self._mode)], seed, setting.sampling)
        (result,) = self._compositor.run(request)
        seconds, processor = time.perf_counter() - started, time.process_time() - processor_started
        return _Composited(result.image, seconds, processor, self._counter.rows)

    def _compare(self, pair: TruthPair, exact: Picture, composited: _Composited) -> Trial:
        picture, recognised = composited.picture, None
        if self._gallery:
            found = self._gallery.recognised(identity_of(picture[pair.box.slices]), pair.seed)
            recognised = found["identity"]
        drawn = pair.hidden.slices
        difference = picture[drawn].astype(np.float64) - exact[drawn]
        return Trial(
            composited.seconds,
            composited.processor_seconds,
            composited.rows[DENOISE],
            composited.rows[CONTROL],
            region_ssim(picture, pair.truth, pair.box),
            region_psnr(picture, pair.truth, pair.box),
            recognised,
            float(np.sqrt(np.mean(difference**2))),
        )


@dataclass(frozen=True)
class SettingResult:
    """One line of the table: means over the pairs, and medians of the speed-ups."""

    name: str
    lever: str
    sampling: dict[str, Any]
    speed_up: float
    """Median over the pairs of the time of `exact` / the time."""
    processor_speed_up: float
    """The same of the processor's time."""
    unet_rows: float
    control_rows: float
    ssim: float
    ssim_loss: float
    """Of `exact` minus its own, pair by pair."""
    ssim_loss_error: float
    """Standard error of that mean."""
    psnr: float
    recognised: float | None
    change: float
    """Change from `exact` / the change that another seed makes."""
    loss: float
    """`ssim_loss` / the mean difference in SSIM that another seed makes."""


def summarise(todo: Sequence[Setting], trials: Sequence[Sequence[Trial]]) -> list[SettingResult]:
    """Summarise every setting.

    Args:
        todo: the settings, `exact` first.
        trials: per pair, one trial per setting.
    """
    by_setting = list(zip(*trials))
    exact = by_setting[0]
    other = by_setting[[setting.name for setting in todo].index(OTHER_SEED)]
    seed_change = _root_mean_square([trial.change for trial in other])
    seed_difference = statistics.fmean(abs(a.ssim - b.ssim) for a, b in zip(other, exact))
    return [
        _summary(setting, own, exact, seed_change, seed_difference) for setting, own in zip(todo, by_setting)
    ]


def _summary(
    setting: Setting,
    own: Sequence[Trial],
    exact: Sequence[Trial],
    seed_change: float,
    seed_difference: float,
) -> SettingResult:
    pairs = list(zip(exact, own))
    losses = [e.ssim - trial.ssim for e, trial in pairs]
    loss = statistics.fmean(losses)
    recognised = [trial.recognised for trial in own if trial.recognised is not None]
    return SettingResult(
        name=setting.name,
        lever=setting.lever,
        sampling=asdict(setting.sampling),
        speed_up=statistics.median(e.seconds / trial.seconds for e, trial in pairs),
        processor_speed_up=statistics.median(
            e.processor_seconds / trial.processor_seconds for e, trial in pairs
        ),
        unet_rows=statistics.fmean(trial.unet_rows for trial in own),
        control_rows=statistics.fmean(trial.control_rows for trial in own),
        ssim=statistics.fmean(trial.ssim for trial in own),
        ssim_loss=loss,
        ssim_loss_error=statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else 0.0,
        psnr=statistics.fmean(trial.psnr for trial in own),
        recognised=statistics.fmean(recognised) if recognised else None,
        change=_ratio(_root_mean_square([trial.change for trial in own]), seed_change),
        loss=_ratio(loss, seed_difference),
    )


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(statistics.fmean(value**2 for value in values))


def _ratio(value: float, whole: float) -> float:
    return value / whole if whole else 0.0
