"""Recipes: one TOML file describes a whole training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from runtime.errors import InputError
from runtime.toml_file import read_settings
from training.data.pairs import Kind, PairRules
from training.data.sources import SOURCES
from training.loop import LoopSettings
from training.network.architecture import Architecture, ArchitectureError
from training.systems.anydoor import Denoising

Default = bool | float | str | tuple[float, ...]


@dataclass(frozen=True)
class DataSettings:
    """How much is drawn for a model that learns from the renderer."""

    objects: int = 4000
    pairs: int = 8000
    kind: Kind = "multi-view"
    """What two views of an object count as for the timestep rule."""
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
    """How often it is drawn from in relation to the others."""


@dataclass(frozen=True)
class Recipe:
    """A training run. A stage without a section is not run."""

    start: str = ""
    """An official checkpoint to go on from; its autoencoder and ID encoder stay as they are."""
    checkpoint_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights in the checkpoint that is written."""
    architecture: Architecture = field(default_factory=Architecture)
    data: DataSettings = field(default_factory=DataSettings)
    pairs: PairRules = field(default_factory=PairRules)
    denoising: Denoising = field(default_factory=Denoising)
    autoencoder: LoopSettings | None = None
    decoder: LoopSettings | None = None
    identity: LoopSettings | None = None
    hint_block: LoopSettings | None = None
    diffusion: LoopSettings | None = None
    sources: tuple[SourceSettings, ...] = ()
    """What the diffusion part learns from; if empty, rendered and encoded pairs."""
    defaults: Mapping[str, Default] = field(default_factory=dict)
    """What a request should use where it gives no value: parameter, like guidance_scale or mode -> value.
    Written into the checkpoint and used for the sheets of samples. The runtime checks it."""


def read_recipe(path: Path) -> Recipe:
    """Reads a recipe; missing settings have their defaults.

    Raises:
        InputError: it cannot be read, or a section, a setting or a value is not one that exists.
    """
    try:
        recipe = read_settings(path, Recipe, "the recipe")
    except ArchitectureError as error:
        raise InputError(f"'{path}': [architecture]: {error}") from error
    for source in recipe.sources:
        if source.name not in SOURCES:
            raise InputError(f"'{path}': no data set is called '{source.name}'; known: {', '.join(SOURCES)}")
    if recipe.sources and recipe.denoising.attention_guide:
        raise InputError(f"'{path}': [denoising] attention_guide is for rendered pairs, not for [[sources]]")
    return recipe
