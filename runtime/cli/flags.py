"""Turns dataclasses of options into flags, one per field, and back.

The metadata of a field describes its flag: `help`, `is_size` for an amount of memory, and arguments of
`argparse.ArgumentParser.add_argument`, like `choices` and `metavar`. The flag of `memory_budget` is
`--memory-budget`. A flag that is not given is None, so that every default stays in one place.
"""

from __future__ import annotations

import argparse
import os
import types
from collections.abc import Iterable
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from engines.options import EngineOptions
from runtime.sizes import size_flag, size_text

DEFAULT_BUNDLE = "build/engines/anydoor"
BUNDLE_VARIABLE = "ANYDOOR_BUNDLE"


def default_bundle() -> Path:
    """Returns the default bundle: that of $ANYDOOR_BUNDLE, or `DEFAULT_BUNDLE`."""
    return Path(os.environ.get(BUNDLE_VARIABLE, DEFAULT_BUNDLE))


def add_bundle_flag(parser: argparse._ActionsContainer) -> None:
    """Adds --bundle, which is None if not given; see `default_bundle`."""
    parser.add_argument(
        "--bundle",
        type=Path,
        metavar="DIR",
        help=f"directory of the bundle (default: ${BUNDLE_VARIABLE}, else {DEFAULT_BUNDLE})",
    )


def add_segmenter_flag(parser: argparse._ActionsContainer) -> None:
    """Adds --segmenter, a list that is None if not given."""
    parser.add_argument(
        "--segmenter",
        action="append",
        type=Path,
        metavar="DIR",
        help="bundle that finds objects; may be repeated: one for the main object of a picture, one for "
        "clicks (default: a rule for plain backgrounds)",
    )


def parse_click(text: str) -> tuple[int, int, bool]:
    """Parses `x,y`, a point on the object, or `!x,y`, a point that is not on it.

    Raises:
        argparse.ArgumentTypeError: the text is neither.
    """
    try:
        x, y = (int(part) for part in text.removeprefix("!").split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a click: two whole numbers x,y are expected, like 120,80, or !120,80 for "
            "a point that is not on the object"
        ) from error
    return x, y, not text.startswith("!")


def parse_box(text: str) -> tuple[int, int, int, int]:
    """Parses `x0,y0,x1,y1` into four numbers.

    Raises:
        argparse.ArgumentTypeError: it is not.
    """
    try:
        x0, y0, x1, y1 = (int(part) for part in text.replace(" ", "").split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a box: four whole numbers x0,y0,x1,y1 are expected, like 80,60,300,260"
        ) from error
    return x0, y0, x1, y1


def add_engine_flags(parser: argparse._ActionsContainer) -> None:
    """Adds a flag for every field of `EngineOptions`."""
    add_flags(parser, EngineOptions)


def engine_options(options: argparse.Namespace) -> EngineOptions:
    """Returns the engine's options from parsed flags.

    Raises:
        BackendError: a value is out of range.
    """
    return EngineOptions(**given(options, field_names(EngineOptions)))


def add_flags(parser: argparse._ActionsContainer, kind: type) -> None:
    """Adds a flag for every field of a dataclass, including those of nested dataclasses."""
    hints = get_type_hints(kind)
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            add_flags(parser, hints[field.name])
        else:
            parser.add_argument(flag_of(field.name), default=None, **_flag(field, hints[field.name]))


def field_names(kind: type) -> list[str]:
    """Lists the fields of a dataclass that have a flag; see `add_flags`."""
    hints = get_type_hints(kind)
    names: list[str] = []
    for field in fields(kind):
        hint = hints[field.name]
        within = isinstance(hint, type) and is_dataclass(hint)
        names += field_names(hint) if within else [field.name]
    return names


def flag_of(name: str) -> str:
    """Returns the flag of a field, like --memory-budget for memory_budget."""
    return f"--{name.replace('_', '-')}"


def given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Maps names to values, for the flags that were given."""
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _flag(field: Field[Any], hint: Any) -> dict[str, Any]:
    """Returns the arguments of `add_argument` for a field."""
    flag: dict[str, Any] = dict(field.metadata)
    is_size, default = flag.pop("is_size", False), field.default
    if isinstance(default, tuple):
        default = ", ".join(default)
    elif is_size and isinstance(default, int):
        default = size_text(default)
    if default not in ("", None, False, True):
        flag["help"] += f" (default: {default})"
    kind = _without_none(hint)
    if is_size:
        flag["type"] = size_flag
    elif kind is bool:
        flag["action"] = argparse.BooleanOptionalAction if field.default else "store_true"
    elif get_origin(kind) is tuple:
        flag["action"] = "append"
    elif kind is not str:
        flag["type"] = kind
    return flag


def _without_none(hint: Any) -> Any:
    """Returns the type of a field that may be None."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(kind for kind in get_args(hint) if kind is not type(None))
    return hint
