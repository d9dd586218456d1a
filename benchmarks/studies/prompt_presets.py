"""Do the quality presets hold where a prompt says what is drawn? Compares them with the exact picture.

    python benchmarks/studies/prompt_presets.py build/engines/sd-small --prompts prompts.txt

As `benchmarks/speed_vs_quality.py`, for pictures that are drawn from nothing, of which no true one is known:
the change that a preset makes is divided by the change that another seed makes (root mean square of pixels),
and has to keep the limit of that command, as has the processor's time. `dpm_solver_2m` and guidance intervals
are measured alone, too, to tell which of them a failure comes from.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.support.machine import describe
from benchmarks.support.results import require_writable, write_results
from benchmarks.support.speed_vs_quality_report import LIMITS
from engines.errors import AnyDoorError
from runtime import Compositor, Request, Sampling
from runtime.cli.flags import add_engine_flags, engine_options
from runtime.diffusion.presets import QUALITIES
from runtime.errors import InputError
from runtime.progress_bar import ProgressBar

Picture = NDArray[np.uint8]

EXACT, OTHER_SEED = "exact", "exact, other seed"
_OTHER = 1_000_000

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    EXACT: {},
    OTHER_SEED: {},
    "ddim 20": {"steps": 20},
    "dpm_solver_2m 20": {"steps": 20, "sampler": "dpm_solver_2m"},
    "dpm_solver_2m 12": {"steps": 12, "sampler": "dpm_solver_2m"},
    "guidance 200-999": {"guidance_interval": (200, 999)},
    # detail maps, which these models have not, left out
    **{
        quality: {name: value for name, value in preset.items() if name != "map_steps"}
        for quality, preset in QUALITIES.items()
        if preset
    },
}
"""What is measured -> its parameters of sampling."""


def draw(compositor: Compositor, prompt: str, seed: int, sampling: Sampling) -> tuple[Picture, float]:
    """Draw a picture; also return the seconds of the processor that it took."""
    compositor.clear()
    started = time.process_time()
    [result] = compositor.run(Request.drawing(prompt, seed=seed, sampling=sampling))
    return np.asarray(result.image), time.process_time() - started


def measure(
    compositor: Compositor, prompts: Sequence[str], seeds: Sequence[int], guidance_scale: float | None
) -> list[dict[str, Any]]:
    """Draw every prompt from every seed with every setting; return a row per setting."""
    changes: dict[str, list[float]] = {name: [] for name in SETTINGS}
    speed_ups: dict[str, list[float]] = {name: [] for name in SETTINGS}
    todo = [(prompt, seed) for prompt in prompts for seed in seeds]
    for prompt, seed in ProgressBar(todo, desc="drawing", leave=False):
        exact, seconds = draw(compositor, prompt, seed, Sampling(guidance_scale=guidance_scale))
        for name, values in SETTINGS.items():
            own = seed + (_OTHER if name == OTHER_SEED else 0)
            sampling = Sampling(guidance_scale=guidance_scale, **values)
            picture, taken = draw(compositor, prompt, own, sampling)
            changes[name].append(float(np.square(picture.astype(np.float64) - exact).mean()))
            speed_ups[name].append(seconds / taken)
    unit = statistics.fmean(changes[OTHER_SEED])
    return [
        {
            "setting": name,
            "speed_up": statistics.median(speed_ups[name]),
            "change": (statistics.fmean(changes[name]) / unit) ** 0.5 if unit else 0.0,
        }
        for name in SETTINGS
    ]


def verdict(row: Mapping[str, Any]) -> str:
    """Say whether a preset keeps its limits; nothing for other settings."""
    limit = LIMITS.get(row["setting"])
    if limit is None:
        return ""
    kept = row["speed_up"] >= limit.speed_up and row["change"] <= limit.change
    wanted = f"at least {limit.speed_up:g}x, at most {limit.change:g}"
    return f"{'ok' if kept else 'OUT'} ({wanted})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 if a preset does not keep its limits, 2 if something cannot be used."""
    parser = argparse.ArgumentParser(
        prog="prompt_presets.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="of a model that draws from prompts")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="one a line")
    parser.add_argument("--seeds", type=int, default=8, metavar="N", help="of each prompt (default: 8)")
    parser.add_argument("--guidance-scale", type=float, metavar="G", help="default: the model's")
    parser.add_argument("--output", type=Path, default=Path("build/prompt_presets.json"), metavar="FILE")
    add_engine_flags(parser)
    options = parser.parse_args(arguments)
    try:
        require_writable(options.output)
        prompts = [line for line in options.prompts.read_text("utf-8").splitlines() if line.strip()]
        if options.seeds < 1 or not prompts:
            raise InputError("--seeds is at least 1, and --prompts has a line at least")
        compositor = Compositor.load(options.bundle, engine_options(options))
        rows = measure(compositor, prompts, range(options.seeds), options.guidance_scale)
        settings = {"prompts": prompts, "seeds": options.seeds, "guidance_scale": options.guidance_scale}
        checkpoint = dict(compositor.bundle.manifest.checkpoint)
        content = {"machine": describe(), "checkpoint": checkpoint, "settings": settings, "rows": rows}
        write_results(options.output, content)
    except (AnyDoorError, OSError) as error:
        print(f"prompt_presets.py: {error}", file=sys.stderr)
        return 2
    print(f"{'setting':<20} {'CPU time':>9} {'change / seed':>14}")
    for row in rows:
        print(f"{row['setting']:<20} {row['speed_up']:>8.2f}x {row['change']:>14.2f}  {verdict(row)}")
    return int(any("OUT" in verdict(row) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
