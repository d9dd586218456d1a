"""Is it the subject, and is its class still there? Measures what DreamBooth has trained, as its paper does.

    python benchmarks/subject.py cup.toml dog.toml --dino dino-vits16 --clip clip-vit-b32 --lpips lpips
    python benchmarks/subject.py cup.toml --train --ablations no-prior --every --prompts prompts.txt
    python benchmarks/subject.py RECIPE --train --objects build/subjects --subjects 5 --count 100
    python benchmarks/subject.py RECIPE --train --set subject.steps=600 --runs runs/longer

A row per checkpoint: DINO, CLIP-I and CLIP-T of pictures of the subject, PRES (lower is better) and DIV
(higher is better); see support/subject.py. Each needs weights in a folder of yours; nothing is downloaded.
Beside them, or without any, a descriptor of colours and edges scores that was made for rendered objects,
and DIV is also measured by the model's own autoencoder (support/feature_distance.py).

Recipes are those of dreambooth. What was trained is read from runs/NAME; --train trains first, or goes on.
--ablations adds the paper's: without the prior, with a --wrong class noun, with none. With --objects, folders
of pictures called NAME-CLASS take the place of the recipe's subject; a row is the mean over them, and each is
recognised among all objects. Under an ablation stands its difference to the recipe as it is, with the
standard error over the subjects. Prints a table; writes subject.json and a contact sheet, subject.png.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.support.embeddings import load_clip, load_clip_text, load_dino
from benchmarks.support.feature_distance import AutoencoderDistance
from benchmarks.support.lpips import load_lpips
from benchmarks.support.machine import describe
from benchmarks.support.results import require_writable, write_results
from benchmarks.support.subject import Drawn, Judges, object_gallery
from benchmarks.support.subject_runs import (
    ABLATIONS,
    CLASS,
    IDENTIFIER,
    SUBJECT,
    Run,
    compare,
    draw,
    find_runs,
    open_autoencoder,
    summarise,
)
from engines.errors import AnyDoorError
from engines.files import replacing
from runtime.diffusion.ddim import MAX_STEPS
from runtime.errors import InputError
from training.data.pairs import Picture

Scores = dict[tuple[str, str], list[dict[str, float]]]
"""Variant and checkpoint -> the scores of its subjects."""

Strips = dict[tuple[str, str], list[Picture]]
"""Variant and checkpoint -> a strip of pictures of each subject."""

SHOWN = 6
"""Pictures of a kind in the contact sheet."""

_QUOTED = re.compile(r"""^(['"])(.*)\1(\.format\(.*\))?,?$""")
"""A prompt as the paper's list has it: google/dreambooth, dataset/prompts_and_classes.txt."""

_GAP, _HEADING = 8, 16
"""Between the subjects of the contact sheet, and above them, in pixels."""


def read_prompts(path: Path | None) -> list[str]:
    """Read prompts, one a line; without a file, the subject's name alone.

    {} stands for the name, or {0} for the identifier and {1} for the class. Lines may be those of the paper's
    list: in quotes, with .format(...) behind.

    Raises:
        InputError: it cannot be read, or a line does not name the subject.
    """
    if path is None:
        return [SUBJECT]
    try:
        lines = [_QUOTED.sub(r"\2", line.strip()) for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' cannot be read ({error})") from error
    prompts = [line for line in lines if line]
    if not prompts or any(SUBJECT not in prompt and IDENTIFIER not in prompt for prompt in prompts):
        raise InputError(
            f"'{path}': every line is a prompt with {SUBJECT} for the subject's name, or with {IDENTIFIER} "
            f"for its identifier and {CLASS} for its class"
        )
    return prompts


def open_judges(options: argparse.Namespace, objects: Sequence[Path], run: Run) -> Judges:
    """Open the networks whose weights were given, the autoencoder of a run's start, and the objects to
    recognise a subject among."""
    gallery = object_gallery(objects, run.recipe.subject.resolution) if objects else None
    return Judges(
        options.dino and load_dino(options.dino),
        options.clip and load_clip(options.clip),
        options.clip and load_clip_text(options.clip),
        options.lpips and load_lpips(options.lpips),
        AutoencoderDistance(open_autoencoder(run)),
        gallery,
    )


def strip(drawn: Drawn) -> Picture:
    """Lay out real pictures, those of the subject and those of its class, in a row each."""
    kinds = (drawn.real, *drawn.subject.values(), drawn.of_class)
    blank = np.full_like(drawn.real[0], 255)
    rows = [[*kind[:SHOWN], *[blank] * (SHOWN - len(kind))] for kind in kinds]
    return np.concatenate([np.concatenate(row, axis=1) for row in rows])


def contact_sheet(strips: Strips) -> Picture:
    """Lay out a row per checkpoint, under its name, with the strips of its subjects side by side."""
    rows = []
    for names, own in strips.items():
        height, width = own[0].shape[:2]
        row = Image.new("RGB", (len(own) * (width + _GAP) - _GAP, height + _HEADING), "white")
        ImageDraw.Draw(row).text((2, 2), ", ".join(names), fill="black")
        for column, picture in enumerate(own):
            row.paste(Image.fromarray(picture), (column * (width + _GAP), _HEADING))
        rows.append(np.asarray(row))
    return np.concatenate(rows)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the rows."""
    names = list(rows[0]["mean"])
    lines = [f"{'training run':<36} {'checkpoint':<10} " + " ".join(f"{name:>18}" for name in names)]
    for row in rows:
        values = (f"{row['mean'][name]:>18.3f}" for name in names)
        lines.append(f"{row['variant']:<36} {row['checkpoint']:<10} " + " ".join(values))
        if found := row.get("difference"):
            values = (f"{found[name]['mean']:+.3f} ± {found[name]['standard_error']:.3f}" for name in names)
            lines.append(f"{'  difference':<47} " + " ".join(f"{value:>18}" for value in values))
    return "\n".join(lines)


def measure(options: argparse.Namespace) -> tuple[list[dict[str, Any]], Strips]:
    """Train what is to be trained, and score every checkpoint; return rows and the parts of the sheet.

    Raises:
        AnyDoorError: a recipe, a folder or a setting cannot be used.
    """
    prompts = read_prompts(options.prompts)
    objects = sorted(path for path in options.objects.iterdir() if path.is_dir()) if options.objects else []
    if options.objects and len(objects) < 2:
        raise InputError(f"'{options.objects}' has {len(objects)} folders of pictures; give two or more")
    runs: list[Run] = []
    for recipe in options.recipes:
        runs += find_runs(
            recipe,
            options.runs,
            objects[: options.subjects],
            options.ablations,
            options.wrong,
            options.changes,
        )
    judges = open_judges(options, objects, runs[0])
    scores: Scores = defaultdict(list)
    strips: Strips = defaultdict(list)
    plain = {run.variant: run.plain_variant for run in runs}
    for run in runs:
        if options.train:
            run.train()
        for name, path in run.checkpoints(options.every).items():
            drawn = draw(run, path, prompts, options.count, options.steps, options.batch)
            scores[run.variant, name].append(judges.score(drawn, run.number))
            strips[run.variant, name].append(strip(drawn))
    rows: list[dict[str, Any]] = []
    for (variant, name), own in scores.items():
        row = {"variant": variant, "checkpoint": name, "mean": summarise(own), "subjects": own}
        other = scores.get((plain[variant], name), [])
        if plain[variant] != variant and len(own) == len(other) > 1:
            row["difference"] = compare(own, other)
        rows.append(row)
    return rows, strips


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        prog="subject.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder: dict[str, Any] = {"type": Path, "metavar": "DIR"}
    result.add_argument("recipes", type=Path, nargs="+", metavar="RECIPE", help="of dreambooth")
    result.add_argument("--runs", default=Path("runs"), **folder, help="of the runs (default: %(default)s)")
    result.add_argument("--train", action="store_true", help="train first, or go on")
    result.add_argument(
        "--set",
        action="append",
        default=[],
        dest="changes",
        metavar="NAME=VALUE",
        help="a recipe's setting, like subject.steps=600; give --runs, too",
    )
    result.add_argument(
        "--ablations", nargs="+", choices=ABLATIONS, default=[], help="trained or measured, too: the paper's"
    )
    result.add_argument("--wrong", default="house", metavar="NOUN", help="wrong class noun (default: house)")
    result.add_argument("--every", action="store_true", help="all checkpoints (default: the last)")
    result.add_argument("--objects", **folder, help="folders of pictures, called NAME-CLASS")
    result.add_argument(
        "--subjects", type=int, default=5, metavar="N", help="objects that are learned (default: 5)"
    )
    result.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="one a line; {} is the subject's name, {0} its identifier, {1} its class",
    )
    result.add_argument(
        "--count", type=int, default=4, metavar="N", help="pictures of each prompt (default: 4, the paper's)"
    )
    result.add_argument("--steps", type=int, default=50, metavar="N", help="of sampling (default: 50)")
    result.add_argument("--batch", type=int, default=1, metavar="N", help="pictures at once (default: 1)")
    result.add_argument("--dino", **folder, help="weights of DINO ViT-S/16 (transformers)")
    result.add_argument("--clip", **folder, help="weights of CLIP ViT-B/32 (transformers)")
    result.add_argument("--lpips", **folder, help="weights of LPIPS: alexnet*.pth and alex.pth")
    result.add_argument("--output", default=Path("build/subject"), **folder, help="default: %(default)s")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 2 if something cannot be used."""
    options = parser().parse_args(arguments)
    results, sheet = options.output / "subject.json", options.output / "subject.png"
    try:
        if min(options.count, options.steps, options.batch, options.subjects) < 1:
            raise InputError("--count, --steps, --batch and --subjects are at least 1")
        if options.steps > MAX_STEPS:
            raise InputError(f"--steps is {options.steps}; at most {MAX_STEPS} can be taken")
        require_writable(results)
        rows, strips = measure(options)
        names = ("count", "steps", "subjects", "ablations", "changes")
        settings = {name: getattr(options, name) for name in names}
        settings["prompts"] = read_prompts(options.prompts)
        write_results(results, {"machine": describe(), "settings": settings, "rows": rows})
        with replacing(sheet) as partial:
            Image.fromarray(contact_sheet(strips)).save(partial, "PNG")
    except (AnyDoorError, OSError) as error:
        print(f"subject.py: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    print(f"{results}, {sheet}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
