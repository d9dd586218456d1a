"""Recipes: one TOML file holds all that a training run is made of."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from training.data.pairs import Kind, PairRules
from training.data.sources import SOURCES
from training.loop import LoopSettings
from training.network.architecture import Architecture
from training.systems.anydoor import Denoising

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
    checkpoint_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights in the checkpoint that is written."""
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


_IN_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def read_recipe(path: Path) -> Recipe:
    """Reads a recipe; missing settings have their defaults.

    Raises:
        RecipeError: it cannot be read, or a section, a setting or a value is not one that there is.
    """
    try:
        text = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:  # no TOML, or no UTF-8
        raise RecipeError(f"cannot read the recipe {path}: {error}") from error
    sources = text.pop("sources", [])
    if not isinstance(sources, list):
        raise RecipeError(f"{path}: sources are written [[sources]], once for each data set")
    listed = tuple(_section(SourceSettings, "sources", values, path) for values in sources)
    for source in listed:
        if source.name not in SOURCES:
            raise RecipeError(f"{path}: no data set is called '{source.name}'; known: {', '.join(SOURCES)}")
    sections: dict[str, Any] = {
        name: _section(_SECTIONS[name], name, text.pop(name), path) for name in _SECTIONS if name in text
    }
    for name, values in text.items():
        if isinstance(values, dict):
            raise RecipeError(f"{path}: unknown section [{name}]; known: {', '.join(_SECTIONS)}")
    recipe = Recipe(sources=listed, **sections, **_values(Recipe, "the recipe", text, path))
    if recipe.sources and recipe.denoising.attention_guide:
        raise RecipeError(f"{path}: [denoising] attention_guide is for rendered pairs, not for [[sources]]")
    return recipe


def _section(kind: type[_Section], name: str, values: Any, path: Path) -> _Section:
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: {name} is {json.dumps(values, default=str)}, expected a section [{name}]")
    try:
        return kind(**_values(kind, f"[{name}]", values, path))
    except TypeError as error:  # a setting without a default is missing
        raise RecipeError(f"{path}: [{name}]: {error}") from error


def _values(kind: type, place: str, values: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings of a section, each of the type that it should have."""
    known = get_type_hints(kind)
    for name, value in values.items():
        if name not in known:
            raise RecipeError(f"{path}: {place} has no '{name}'; known: {', '.join(sorted(known))}")
        if not _fits(value, known[name]):
            raise RecipeError(
                f"{path}: {name} of {place} is {json.dumps(value, default=str)}, "
                f"expected {_in_words(known[name])}"
            )
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of TOML is of a field's type."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        if not isinstance(value, list):
            return False
        if kinds[-1] is Ellipsis:
            return bool(value) and all(_fits(each, kinds[0]) for each in value)
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    return type(value) is kind or (kind is float and type(value) is int)


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(json.dumps(value) for value in get_args(kind))
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        count = "" if kinds[-1] is Ellipsis else f"{len(kinds)} times "
        return f"a list, {count}{_in_words(kinds[0])}"
    return _IN_WORDS[kind]
