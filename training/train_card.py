"""Trains small models on a card in the minutes that there are, and packs what they learned into small files.

Recipes that learn from rendered objects share them, and they are drawn first. Then all learn side by side:
one small network does not fill a card. Everything happens offline. What is packed goes on anywhere: put the
parts together with `cat NAME.part* > NAME`, and the averaged weights of a stage as mean.pt into the folder of
that stage. Without a card it trains on the processor, which rehearses the run.

examples:
    make train-card MINUTES=7
    python -m training.train_card --minutes 7 training/recipes/imprint-small.toml
    python -m training.train_card --minutes 3 training/recipes/imprint-small.toml:views
    python -m training.train_card --minutes 7 training/recipes/anydoor-card.toml --set data.objects=3000
"""

from __future__ import annotations

import argparse
import glob
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from engines.errors import AnyDoorError
from runtime.errors import InputError
from training.clock import TimeLimit, program_start
from training.config import AnyRecipe, CommonRecipe, read_recipe
from training.data.view_store import draw_views
from training.train import check_start, chosen_stages
from training.workers import drawer_count, drawing_device

PACKED_BYTES = 15 << 20
"""Most bytes of a file that is packed; larger ones are cut."""

SECONDS_TO_PACK = 10
"""For what comes after training: the checkpoint is written, and copied."""

FIRST_VERSIONS = {"transformers": (5, 20), "diffusers": (0, 36)}
"""As pyproject.toml has them: on a machine with a card the project need not be installed."""

_CHECKPOINT, _WEIGHTS, _LOGS = "model.safetensors", "mean.pt", ("log.csv", "train.log")


@dataclass(frozen=True)
class Run:
    """A recipe and the stages of it that are trained."""

    path: Path
    stages: tuple[str, ...]
    recipe: AnyRecipe
    changes: tuple[str, ...] = ()
    """Of the recipe, see `read_recipe`."""

    @classmethod
    def of(cls, given: str, changes: Sequence[str] = (), limit: TimeLimit | None = None) -> Run:
        """Reads RECIPE or RECIPE:STAGE,STAGE, with changes of the recipe, to be trained in a time.

        Raises:
            InputError: it cannot be read, has no such stage, or none that has a share of the time.
        """
        path, _, names = given.partition(":")
        stages = tuple(filter(None, names.split(",")))
        recipe = read_recipe(Path(path), changes)
        chosen_stages(recipe, stages, limit)
        return cls(Path(path), stages, recipe, tuple(changes))

    @property
    def drawn(self) -> CommonRecipe | None:
        """The recipe, if it learns from rendered objects."""
        recipe = self.recipe
        return recipe if isinstance(recipe, CommonRecipe) and not recipe.sources else None

    @property
    def name(self) -> str:
        """What its folder is called."""
        return self.path.stem

    def start(self, folder: Path, minutes: float) -> subprocess.Popen[bytes]:
        """Starts it in a process of its own; what it prints goes into train.log."""
        command = [sys.executable, "-m", "training.train", str(self.path), "--folder", str(folder)]
        for stage in self.stages:
            command += ["--stage", stage]
        for change in self.changes:
            command += ["--set", change]
        with (folder / "train.log").open("wb") as log:
            return subprocess.Popen(
                [*command, "--minutes", f"{minutes:.3f}"], stdout=log, stderr=subprocess.STDOUT
            )


def share_objects(runs: Sequence[Run], folder: Path) -> list[Run]:
    """Draws the objects once, and returns the runs, with this folder for those that learn from them.

    Raises:
        InputError: they want different numbers of objects, or have different folders for them.
    """
    recipes = [run.drawn for run in runs if run.drawn]
    folders = sorted({recipe.data.objects_folder for recipe in recipes})
    if len(folders) > 1:
        raise InputError(f"the recipes share their objects, and have other folders for them: {folders}")
    counts = sorted({recipe.data.objects for recipe in recipes})
    if len(counts) > 1:
        raise InputError(f"the recipes share their objects, and want {counts} of them: make it one number")
    for run in runs:
        (folder / run.name).mkdir(parents=True, exist_ok=True)
    if not recipes:
        return list(runs)
    objects = recipes[0].data.objects_in(folder / "objects")
    workers = max(drawer_count(recipe.data.workers) for recipe in recipes)
    draw_views(objects, counts[0], max(workers, 1), drawing_device())
    as_toml = json.dumps(str(objects), ensure_ascii=False)
    shared = f"data.objects_folder={as_toml}"
    return [replace(run, changes=(*run.changes, shared)) if run.drawn else run for run in runs]


def wait_for(processes: dict[str, subprocess.Popen[bytes]], folder: Path, limit: TimeLimit) -> list[str]:
    """Waits until all have ended; says now and then how far they are. Returns those that failed.

    Those that run on after the time and `SECONDS_TO_PACK` are ended: what they saved is packed nevertheless.
    Where it is interrupted, it stops them first.
    """
    told = 0.0
    end = limit.began + limit.seconds + SECONDS_TO_PACK
    try:
        while any(process.poll() is None for process in processes.values()):
            time.sleep(0.2)
            if time.monotonic() > end:
                for process in processes.values():
                    process.kill()
                    process.wait()
            if time.monotonic() - told > 20:
                told = time.monotonic()
                for name in processes:
                    print(f"train_card: {name}: {_last_line(folder / name / 'train.log')}", file=sys.stderr)
    except KeyboardInterrupt:
        for process in processes.values():
            process.send_signal(signal.SIGINT)
        for process in processes.values():
            process.wait()
        raise
    return [name for name, process in processes.items() if process.returncode]


def _last_line(log: Path) -> str:
    lines = log.read_text("utf-8", "replace").replace("\r", "\n").split("\n") if log.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "starts")[:160]


def pack(run: Path, output: Path) -> list[Path]:
    """Copies what a run learned, in files of at most `PACKED_BYTES`, and returns them.

    That is its checkpoint, a folder as model.tar, or the averaged weights of each stage if there is none that
    has them, and its logs. What an earlier call has packed of them is replaced.
    """
    for kind in (_CHECKPOINT, f"*{_WEIGHTS}", "model.tar"):
        for earlier in output.glob(f"{glob.escape(run.name)}-{kind}*"):
            earlier.unlink()
    packed = []
    weights = sorted(run.rglob(_WEIGHTS))
    if (checkpoint := run / _CHECKPOINT).exists():
        written = checkpoint.stat().st_mtime_ns
        if all(each.stat().st_mtime_ns <= written for each in weights):
            weights = [checkpoint]
    if (folder := run / "model").is_dir():
        weights = [Path(shutil.make_archive(str(folder), "tar", folder))]
    for path in [*weights, *sorted(path for name in _LOGS for path in run.rglob(name))]:
        name = "-".join((run.name, *path.relative_to(run).parts))
        size = path.stat().st_size
        if size <= PACKED_BYTES:
            packed.append(Path(shutil.copy2(path, output / name)))
            continue
        with path.open("rb") as whole:
            for number in range(-(-size // PACKED_BYTES)):
                part = output / f"{name}.part{number:03}"
                part.write_bytes(whole.read(PACKED_BYTES))
                packed.append(part)
    return packed


def check_libraries() -> None:
    """Refuses an environment that reads no checkpoint, before the minutes are spent.

    Raises:
        InputError: names the library.
    """
    for name, first in FIRST_VERSIONS.items():
        try:
            found = version(name)
        except PackageNotFoundError as error:
            raise InputError(f"{name} is not installed: pip install '.[train]'") from error
        if tuple(int(part) for part in found.split(".")[:2]) < first:
            raise InputError(f"{name} {found} is too old, it must be {'.'.join(map(str, first))} or later")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        0, 1 if a run failed (the others are packed), 2 if none can be started, or 130 if it is stopped.
    """
    parser = argparse.ArgumentParser(
        prog="python -m training.train_card",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipes", nargs="+", metavar="RECIPE[:STAGE,...]", help="default of stages: all")
    parser.add_argument("--minutes", type=float, required=True, help="for everything, from now")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="another value than the recipes', as TOML",
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/card"), help="default: %(default)s")
    parser.add_argument(
        "--output", type=Path, default=Path("build/train-card"), help="of the packed files; %(default)s"
    )
    options = parser.parse_args(arguments)
    limit = TimeLimit(60 * options.minutes - SECONDS_TO_PACK, program_start())
    try:
        check_libraries()
        if not 0 < limit.seconds < math.inf:
            raise InputError(
                f"--minutes is {options.minutes:g}; writing and packing alone take {SECONDS_TO_PACK} s"
            )
        runs = [Run.of(each, options.set, limit) for each in options.recipes]
        if len({run.name for run in runs}) < len(runs):
            raise InputError("two recipes have one name, and so one folder: give their stages together")
        for run in runs:
            check_start(run.recipe)
        options.output.mkdir(parents=True, exist_ok=True)
        runs = share_objects(runs, options.folder)
        processes = {run.name: run.start(options.folder / run.name, limit.left / 60) for run in runs}
        failed = wait_for(processes, options.folder, limit)
        packed = [file for run in runs for file in pack(options.folder / run.name, options.output)]
    except (AnyDoorError, OSError) as error:
        print(f"train_card: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train_card: interrupted; the same command goes on from what was saved last", file=sys.stderr)
        return 130
    for file in packed:
        print(f"{file} ({file.stat().st_size / 1e6:.1f} MB)")
    for name in failed:
        log = options.folder / name / "train.log"
        print(f"train_card: {name} failed: {_last_line(log)}; see '{log}'", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
