"""Which training runs of DreamBooth are measured, and what their checkpoints draw."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from benchmarks.support.subject import Drawn
from runtime.errors import InputError
from training.config import DreamBoothRecipe, read_recipe
from training.data.subject import read_pictures
from training.network.lora import merge_lora
from training.network.stable_diffusion_checkpoint import StableDiffusionCheckpoint, read_stable_diffusion
from training.stages.dreambooth import STAGES, build_network, checkpoint_name, open_start
from training.systems.dreambooth import SubjectSettings
from training.systems.stable_diffusion import draw_pictures

ABLATIONS = ("no-prior", "wrong-noun", "no-noun")
"""The paper's (section 4.3): without the class's pictures, and with other names of the subject."""

SUBJECT = "{}"
"""What stands for the subject's name in a prompt."""

IDENTIFIER, CLASS = "{0}", "{1}"
"""What stands for the parts of its name, as in the paper's list of prompts."""


@dataclass(frozen=True)
class Run:
    """A training run: a recipe, as it is or as an ablation, for one subject."""

    variant: str
    recipe: DreamBoothRecipe
    folder: Path
    number: int = 0
    """Of the subject among the objects."""
    ablation: str = ""
    """Of `ABLATIONS`; empty for the recipe as it is."""

    @property
    def plain_variant(self) -> str:
        """What the recipe without an ablation is called."""
        return self.variant.removesuffix(f"-{self.ablation}")

    def train(self) -> None:
        """Trains it, or goes on where it stopped."""
        for stage in STAGES.values():
            stage(self.recipe, self.folder)

    def checkpoints(self, every: bool) -> dict[str, Path]:
        """Returns names what it has written: the last checkpoint, or all of them in their order.

        Raises:
            InputError: there is none.
        """
        name = checkpoint_name(self.recipe)
        folders = sorted(self.folder.glob("step-*")) if every else [self.folder]
        found = {each.name if every else "last": each / name for each in folders if (each / name).exists()}
        if not found:
            raise InputError(f"there is no {name} in '{self.folder}': train it, or give --train")
        return found

    def open(self, path: Path) -> StableDiffusionCheckpoint:
        """Opens a checkpoint; low-rank updates are merged into the start."""
        if self.recipe.subject.rank:
            return merge_lora(read_stable_diffusion(self.recipe.start), path)
        return read_stable_diffusion(path)


def find_runs(
    recipe_path: Path,
    runs: Path,
    subjects: Sequence[Path],
    ablations: Sequence[str],
    wrong: str,
    changes: Sequence[str] = (),
) -> Iterator[Run]:
    """Gives the runs of a recipe, and those of its ablations.

    Args:
        recipe_path: of the recipe.
        runs: folder of the runs.
        subjects: folders of pictures, called NAME-CLASS, that take the place of the recipe's; if empty, it
            is that.
        ablations: of `ABLATIONS`.
        wrong: the class noun of the ablation with a wrong one.
        changes: of the recipe, see `read_recipe`.

    Raises:
        InputError: the recipe is not one of DreamBooth, or a folder's name has no class.
    """
    recipe = read_recipe(recipe_path, changes)
    if not isinstance(recipe, DreamBoothRecipe):
        raise InputError(f"'{recipe_path}' trains {recipe.system}; give recipes of dreambooth")
    ablated: Mapping[str, Mapping[str, Any]] = {
        "": {},
        "no-prior": {"prior_weight": 0.0},
        "wrong-noun": {"class_noun": wrong},
        "no-noun": {"noun": False},
    }
    for change in ("", *ablations):
        for number, folder in enumerate(subjects or [None]):
            variant = "-".join(filter(None, (recipe_path.stem, change)))
            subject = replace(recipe.subject, **{**_subject_in(folder), **ablated[change]})
            place = runs / (f"{variant}-{folder.name}" if folder else variant)
            yield Run(variant, replace(recipe, subject=subject), place, number, change)


def _subject_in(folder: Path | None) -> dict[str, str]:
    if folder is None:
        return {}
    if "-" not in folder.name:
        raise InputError(f"the name of '{folder}' does not end with -CLASS, like 00-mug")
    return {"pictures": str(folder), "class_noun": folder.name.rpartition("-")[2]}


def draw(run: Run, path: Path, prompts: Sequence[str], count: int, steps: int, batch: int) -> Drawn:
    """Draws what a checkpoint is judged by.

    Args:
        run: of the checkpoint.
        path: the checkpoint.
        prompts: with `SUBJECT`, or `IDENTIFIER` and `CLASS`, in them.
        count: pictures of each prompt, and of the class; picture n has the seed n.
        steps: of sampling.
        batch: pictures at once.
    """
    subject = run.recipe.subject
    _, tokenizer = open_start(run.recipe)
    network = build_network(run.open(path))
    how = (range(count), subject.resolution, steps, subject.guidance_scale, batch)
    asked = {named(prompt, subject): without_identifier(prompt, subject) for prompt in prompts}
    return Drawn(
        read_pictures(Path(subject.pictures), subject.resolution),
        {prompt: list(draw_pictures(network, tokenizer, prompt, *how)) for prompt in asked},
        list(draw_pictures(network, tokenizer, subject.class_prompt, *how)),
        asked,
    )


def named(prompt: str, subject: SubjectSettings) -> str:
    """Puts the subject's name into a prompt."""
    noun = subject.class_noun if subject.noun else ""
    return _filled(prompt, subject.prompt, subject.identifier, noun)


def without_identifier(prompt: str, subject: SubjectSettings) -> str:
    """Puts what the subject is into a prompt, and nothing for its identifier."""
    return _filled(prompt, subject.class_prompt, "", subject.class_noun)


def _filled(prompt: str, name: str, identifier: str, noun: str) -> str:
    words = {SUBJECT: name, IDENTIFIER: identifier, CLASS: noun}
    for place, word in words.items():
        prompt = prompt.replace(place, word)
    return " ".join(prompt.split())


def open_autoencoder(run: Run) -> AutoencoderKL:
    """Opens the autoencoder of a run's start, which training leaves as it is."""
    autoencoder = read_stable_diffusion(run.recipe.start).load_part("vae", torch.float32)
    assert isinstance(autoencoder, AutoencoderKL)
    return autoencoder


Scores = Sequence[Mapping[str, float]]
"""Of several subjects, in their order: name of the score -> value."""


def summarise(scores: Scores) -> dict[str, float]:
    """Means of the scores of several subjects."""
    return {name: statistics.fmean(each[name] for each in scores) for name in scores[0]}


def compare(scores: Scores, others: Scores) -> dict[str, dict[str, float]]:
    """Compares the scores of the same subjects, at least two.

    Returns:
        Name of the score -> `mean` and `standard_error` of the differences to `others`.
    """
    differences = {
        name: [each[name] - other[name] for each, other in zip(scores, others, strict=True)]
        for name in scores[0]
    }
    return {
        name: {
            "mean": statistics.fmean(values),
            "standard_error": statistics.stdev(values) / len(values) ** 0.5,
        }
        for name, values in differences.items()
    }
