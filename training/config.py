"""Recipes: one TOML file holds all that a training run is made of."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from training.architecture import Architecture
from training.data.pairs import Kind, PairRules
from training.data.sources import SOURCES
from training.diffusion import Denoising
from training.loop import LoopSettings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]

_Section = TypeVar("_Section")


@dataclass(frozen=True)
class DataSettings:
    """How much is drawn for a model that learns from the renderer."""

    objects: int = 4000
    pairs: int = 8000
    kind: Kind = "multi-view"
    """What two views of an object pass for where the timestep rule asks."""
    single: float = 0.0
    """Share of the pairs that are one view twice, as those of the sets of still images."""
    workers: int = 0
    """Processes that make pairs while others are encoded; 0 makes them in turn."""


@dataclass(frozen=True)
class SourceSettings:
    """A data set of table 1 on disk."""

    name: str
    """A key of `training.data.sources.SOURCES`."""
    root: str
    weight: float = 1.0
    """How often it is asked in relation to the others."""


@dataclass(frozen=True)
class Recipe:
    """A training run. A stage without a section is not run."""

    start: str = ""
    """An official .safetensors checkpoint to go on from; its autoencoder and ID encoder stay as they are."""
    architecture: Architecture = field(default_factory=Architecture)
    data: DataSettings = field(default_factory=DataSettings)
    pairs: PairRules = field(default_factory=PairRules)
    denoising: Denoising = field(default_factory=Denoising)
    autoencoder: LoopSettings | None = None
    decoder: LoopSettings | None = None
    identity: LoopSettings | None = None
    hint: LoopSettings | None = None
    diffusion: LoopSettings | None = None
    sources: tuple[SourceSettings, ...] = ()
    """What the diffusion part learns from; nothing means rendered and encoded pairs."""


class RecipeError(ValueError):
    """The file is not a recipe; the text says where."""


_SECTIONS = {
    "architecture": Architecture,
    "data": DataSettings,
    "pairs": PairRules,
    "denoising": Denoising,
    "autoencoder": LoopSettings,
    "decoder": LoopSettings,
    "identity": LoopSettings,
    "hint": LoopSettings,
    "diffusion": LoopSettings,
}


def read_recipe(path: Path) -> Recipe:
    """Reads a recipe; unknown sections and settings are errors, missing settings have their defaults."""
    try:
        text = tomllib.loads(path.read_text("utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from error
    start, sources = text.pop("start", ""), text.pop("sources", [])
    unknown = text.keys() - _SECTIONS.keys()
    if unknown:
        raise RecipeError(f"{path}: unknown section [{unknown.pop()}]; known: {', '.join(_SECTIONS)}")
    sections: dict[str, Any] = {
        name: _section(_SECTIONS[name], name, values, path) for name, values in text.items()
    }
    listed = tuple(_section(SourceSettings, "sources", values, path) for values in sources)
    for source in listed:
        if source.name not in SOURCES:
            raise RecipeError(f"{path}: no data set is called '{source.name}'; known: {', '.join(SOURCES)}")
    recipe = Recipe(start=start, sources=listed, **sections)
    if recipe.sources and recipe.denoising.attention_guide:
        raise RecipeError(f"{path}: [denoising] attention_guide is for rendered pairs, not for [[sources]]")
    return recipe


def _section(kind: type[_Section], name: str, values: Mapping[str, Any], path: Path) -> _Section:
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    unknown = values.keys() - known
    if unknown:
        raise RecipeError(f"{path}: [{name}] has no '{unknown.pop()}'; known: {', '.join(sorted(known))}")
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    try:
        return kind(**settings)
    except TypeError as error:
        raise RecipeError(f"{path}: [{name}]: {error}") from error
