"""Do the quality presets hold where a prompt says what is drawn? Compares them with the exact picture.

    python benchmarks/studies/prompt_presets.py build/engines/words --prompts prompts.txt --guidance-scale 3
    python benchmarks/studies/prompt_presets.py build/engines/subject-* --objects build/subjects \\
        --prompts prompts.txt --guidance-scale 3

As `benchmarks/speed_vs_quality.py`, for pictures that are drawn from nothing: the change that a preset makes
is divided by the change that another seed makes (root mean square of pixels), and has to keep the limit of
that command, as has the processor's time. `dpm_solver_2m` and guidance intervals are measured alone, too, to
tell which of them a failure comes from.

With --objects, folders of pictures called NAME-CLASS, bundle n is a DreamBooth subject of object n, and {} in
a prompt is its class ("a gzj {}"). The loss is that of likeness to the object's pictures, as a part of the
mean difference that another seed makes, and has its limit, too; each picture is recognised among all objects.
Both are those of `benchmarks/subject.py`: the descriptor of colours and edges.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.support.embeddings import pairwise_score
from benchmarks.support.identity import Gallery
from benchmarks.support.machine import describe
from benchmarks.support.results import require_writable, write_results
from benchmarks.support.speed_vs_quality_report import LIMITS
from benchmarks.support.subject import describe_middles, object_gallery, recognised
from engines.errors import AnyDoorError
from runtime import Compositor, Request, Sampling
from runtime.cli.flags import add_engine_flags, engine_options
from runtime.diffusion.presets import QUALITIES
from runtime.errors import InputError
from runtime.progress_bar import ProgressBar
from training.data.subject import read_pictures

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


@dataclass(frozen=True)
class Truth:
    """The object that a bundle was tuned to draw."""

    pictures: Sequence[Picture]
    gallery: Gallery
    """All objects."""
    number: int
    """Of this one in the gallery."""

    def likeness(self, picture: Picture) -> float:
        """Return the mean cosine to the object's pictures."""
        return pairwise_score(describe_middles([picture]), describe_middles(self.pictures))


@dataclass(frozen=True)
class Compared:
    """A picture, compared with the exact one of the same prompt and seed."""

    change: float
    """Mean square of the differences, in 8-bit levels."""
    speed_up: float
    """Of the processor's time."""
    likeness: float = 0.0
    """To the object; 0 where none is known."""
    loss: float = 0.0
    """Of likeness."""
    recognised: float = 0.0


def draw(compositor: Compositor, prompt: str, seed: int, sampling: Sampling) -> tuple[Picture, float]:
    """Draw a picture; also return the seconds of the processor that it took."""
    compositor.clear()
    started = time.process_time()
    [result] = compositor.run(Request.drawing(prompt, seed=seed, sampling=sampling))
    return np.asarray(result.image), time.process_time() - started


def measure(
    compositor: Compositor,
    prompts: Sequence[str],
    seeds: Sequence[int],
    guidance_scale: float | None,
    truth: Truth | None = None,
) -> Iterator[tuple[str, Compared]]:
    """Draw every prompt from every seed with every setting; yield the settings and what came of them."""
    todo = [(prompt, seed) for prompt in prompts for seed in seeds]
    for prompt, seed in ProgressBar(todo, desc="drawing", leave=False):
        exact, seconds = draw(compositor, prompt, seed, Sampling(guidance_scale=guidance_scale))
        best = truth.likeness(exact) if truth else 0.0
        for name, values in SETTINGS.items():
            own = seed + (_OTHER if name == OTHER_SEED else 0)
            sampling = Sampling(guidance_scale=guidance_scale, **values)
            picture, taken = draw(compositor, prompt, own, sampling)
            change = float(np.square(picture.astype(np.float64) - exact).mean())
            if truth is None:
                yield name, Compared(change, seconds / taken)
                continue
            likeness = truth.likeness(picture)
            known = recognised(truth.gallery, [picture], truth.number)
            yield name, Compared(change, seconds / taken, likeness, best - likeness, known)


def summarise(found: Mapping[str, Sequence[Compared]], has_truth: bool) -> list[dict[str, Any]]:
    """Return a row per setting; change and loss are parts of what another seed makes."""
    unit = statistics.fmean(each.change for each in found[OTHER_SEED])
    loss_unit = statistics.fmean(abs(each.loss) for each in found[OTHER_SEED])
    rows = []
    for name, own in found.items():
        change = statistics.fmean(each.change for each in own)
        row: dict[str, Any] = {
            "setting": name,
            "speed_up": statistics.median(each.speed_up for each in own),
            "change": (change / unit) ** 0.5 if unit else 0.0,
        }
        if has_truth:
            loss = statistics.fmean(each.loss for each in own)
            row |= {
                "likeness": statistics.fmean(each.likeness for each in own),
                "loss": loss / loss_unit if loss_unit else 0.0,
                "recognised": statistics.fmean(each.recognised for each in own),
            }
        rows.append(row)
    return rows


def verdict(row: Mapping[str, Any]) -> str:
    """Say whether a preset keeps its limits; nothing for other settings."""
    limit = LIMITS.get(row["setting"])
    if limit is None:
        return ""
    kept = (
        row["speed_up"] >= limit.speed_up
        and row["change"] <= limit.change
        and row.get("loss", 0.0) <= limit.loss
    )
    wanted = f"at least {limit.speed_up:g}x, change at most {limit.change:g}, loss at most {limit.loss:g}"
    return f"{'ok' if kept else 'OUT'} ({wanted})"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format the rows."""
    lines = [f"{'setting':<20} {'CPU time':>9} {'change / seed':>14} {'loss / seed':>12} {'recognised':>11}"]
    for row in rows:
        known = f"{row['loss']:>12.2f} {row['recognised']:>11.1%}" if "loss" in row else " " * 24
        lines.append(
            f"{row['setting']:<20} {row['speed_up']:>8.2f}x {row['change']:>14.2f} {known}  {verdict(row)}"
        )
    return "\n".join(lines)


def compare(options: argparse.Namespace, prompts: Sequence[str]) -> dict[str, Any]:
    """Draw with all bundles; return what is written.

    Raises:
        AnyDoorError: a bundle or an object cannot be used.
    """
    folders = sorted(path for path in options.objects.iterdir() if path.is_dir()) if options.objects else []
    if folders and len(folders) < max(2, len(options.bundles)):
        raise InputError(
            f"'{options.objects}' has {len(folders)} folders of pictures; give one for each bundle, and two "
            "at least"
        )
    found: dict[str, list[Compared]] = defaultdict(list)
    checkpoints, gallery, backend = [], None, ""
    for number, path in enumerate(options.bundles):
        compositor = Compositor.load(path, engine_options(options))
        checkpoints.append(dict(compositor.bundle.manifest.checkpoint))
        backend = compositor.engine.backend
        side = min(compositor.bundle.manifest.picture_size)
        own, truth = prompts, None
        if folders:
            gallery = gallery or object_gallery(folders, side)
            truth = Truth(read_pictures(folders[number], side), gallery, number)
            own = [prompt.replace("{}", folders[number].name.rpartition("-")[2]) for prompt in prompts]
        for name, each in measure(compositor, own, range(options.seeds), options.guidance_scale, truth):
            found[name].append(each)
    settings = {"prompts": prompts, "seeds": options.seeds, "guidance_scale": options.guidance_scale}
    return {
        "machine": describe(),
        "backend": backend,
        "checkpoints": checkpoints,
        "settings": settings,
        "limits": {name: asdict(limit) for name, limit in LIMITS.items()},
        "rows": summarise(found, bool(folders)),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 if a preset does not keep its limits, 2 if something cannot be used."""
    parser = argparse.ArgumentParser(
        prog="prompt_presets.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE", help="that draw from prompts")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="one a line")
    parser.add_argument("--objects", type=Path, metavar="DIR", help="folders of pictures, called NAME-CLASS")
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
        content = compare(options, prompts)
        write_results(options.output, content)
    except (AnyDoorError, OSError) as error:
        print(f"prompt_presets.py: {error}", file=sys.stderr)
        return 2
    print(table(content["rows"]))
    return int(any("OUT" in verdict(row) for row in content["rows"]))


if __name__ == "__main__":
    sys.exit(main())
