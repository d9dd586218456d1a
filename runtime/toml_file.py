"""Reads settings from TOML: keys are the fields of a dataclass, tables are nested dataclasses."""

from __future__ import annotations

import difflib
import json
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from runtime.errors import InputError
from runtime.sizes import parse_size

_Settings = TypeVar("_Settings")

_IN_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def read_settings(path: Path, kind: type[_Settings], name: str, changes: Sequence[str] = ()) -> _Settings:
    """Reads a file as an instance of a dataclass; missing keys have their defaults.

    See `read_values`, and `read_toml` for `changes`.

    Raises:
        InputError: see there, or a key without a default is missing.
    """
    return _Reader(path).build(kind, name, read_toml(path, name, changes))


def read_values(path: Path, kind: type | tuple[type, ...], name: str) -> dict[str, Any]:
    """Reads the values in a file, for the fields of a dataclass, or of several side by side.

    A field's type says what its value is: int, float, bool, str, a Literal, a tuple (a TOML list), a
    dataclass (a table), a tuple of dataclasses (an array of tables), or a Mapping from str (a table with any
    keys). A field whose metadata has `is_size` is a number of bytes and may be written like "6G"; one whose
    metadata has a `key` is called that in the file, or is not in it if the key is None.

    Args:
        path: of the file.
        kind: the dataclass, or several; a field that is one of the others is no key.
        name: what to call the file in an error, like "the recipe".

    Returns:
        Field -> value, for the keys that the file has; lists are tuples.

    Raises:
        InputError: the file cannot be read, is not TOML, or has a key or a value that the dataclass does not
            have, in one sentence that names file and key.
    """
    return _Reader(path).values(kind, name, read_toml(path, name))


def read_toml(path: Path, name: str, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Reads a TOML file as nested dictionaries.

    Args:
        path: of the file.
        name: what to call it in an error.
        changes: lines of TOML like "section.key=value", which take the place of what the file says. A
            section that is false is left out.

    Raises:
        InputError: it cannot be read, or it or a change is not TOML.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {name} '{path}': {error.strerror}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise InputError(f"cannot read {name}: '{path}' is not TOML: {error}") from error
    for change in changes:
        try:
            _merge(content, tomllib.loads(change))
        except ValueError as error:
            raise InputError(
                f"'{change}' is not a change of {name}: write SECTION.KEY=VALUE as in TOML, strings in "
                f"quotes ({error})"
            ) from error
    return content


def _merge(table: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        section = table.get(key)
        if not isinstance(section, dict):
            table[key] = value
        elif isinstance(value, dict):
            _merge(section, value)
        elif value is False:
            del table[key]
        else:
            table[key] = value


class _Reader:
    """Checks the tables of one file. `place` is what an error calls a table: [NAME], or the whole file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def build(self, kind: type[_Settings], place: str, table: Mapping[str, Any]) -> _Settings:
        """Makes an instance of a dataclass from a table."""
        values = self.values(kind, place, table)
        for field in fields(kind):  # type: ignore[arg-type]
            if field.name not in values and field.default is field.default_factory is MISSING:
                key = field.metadata.get("key", field.name)
                raise self._error(f"{place} lacks '{key}', which has no default")
        try:
            return kind(**values)
        except InputError as error:
            raise self._error(f"{place}: {error}") from error

    def values(self, kind: type | tuple[type, ...], place: str, table: Mapping[str, Any]) -> dict[str, Any]:
        """Checks a table against the fields of a dataclass, or of several."""
        kinds = kind if isinstance(kind, tuple) else (kind,)
        hints = {name: hint for each in kinds for name, hint in get_type_hints(each).items()}
        metadata: dict[str, Mapping[str, Any]] = {
            field.name: field.metadata for each in kinds for field in fields(each)
        }
        keys = ((metadata.get(name, {}).get("key", name), name) for name in hints)
        names = {key: name for key, name in keys if key is not None}
        known = {key: hints[name] for key, name in names.items() if hints[name] not in kinds}
        sizes = {field.name for each in kinds for field in fields(each) if field.metadata.get("is_size")}
        values = {}
        for key, value in table.items():
            if key not in known:
                what = f"unknown section [{key}]" if isinstance(value, dict) else f"{place} has no '{key}'"
                raise self._error(what + _suggestion(key, known))
            if names[key] in sizes and isinstance(value, str):
                values[names[key]] = self._size(key, value)
            else:
                values[names[key]] = self._value(known[key], key, place, value)
        return values

    def _size(self, key: str, text: str) -> int:
        try:
            return parse_size(text)
        except InputError as error:
            raise self._error(f"{key}: {error}") from error

    def _value(self, kind: Any, key: str, place: str, value: Any) -> Any:
        section = _section(kind)
        if section:
            if not isinstance(value, dict):
                raise self._error(f"{key} is {_shown(value)}, expected a section [{key}]")
            return self.build(section, f"[{key}]", value)
        rows = _section(get_args(kind)[0]) if get_origin(kind) is tuple else None
        if rows:
            if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
                raise self._error(f"{key} are written [[{key}]], once for each")
            return tuple(self.build(rows, f"[{key}]", row) for row in value)
        if get_origin(kind) is Mapping:
            return self._free_table(get_args(kind)[1], key, value)
        if not _fits(value, kind):
            raise self._error(f"{key} of {place} is {_shown(value)}, expected {_in_words(kind)}")
        return _frozen(value)

    def _free_table(self, kind: Any, key: str, table: Any) -> dict[str, Any]:
        """Returns a table with any keys, whose values are all of one type."""
        if not isinstance(table, dict):
            raise self._error(f"{key} is {_shown(table)}, expected a section [{key}]")
        return {name: self._value(kind, name, f"[{key}]", value) for name, value in table.items()}

    def _error(self, problem: str) -> InputError:
        return InputError(f"'{self._path}': {problem}")


def _section(kind: Any) -> type | None:
    """Returns the dataclass of a field that is a table, which may be optional; None for other fields."""
    candidates = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return next((each for each in candidates if is_dataclass(each) and isinstance(each, type)), None)


def _fits(value: Any, kind: Any) -> bool:
    """Returns whether a value of TOML is of a field's type."""
    origin, kinds = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in kinds
    if origin in (Union, types.UnionType):
        return any(_fits(value, each) for each in kinds)
    if origin is tuple:
        if not isinstance(value, list):
            return False
        if kinds[-1] is Ellipsis:
            return all(_fits(each, kinds[0]) for each in value)
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    # true is not a number, though it is an int in Python
    return type(value) is kind or (kind is float and type(value) is int)


def _in_words(kind: Any) -> str:
    origin, kinds = get_origin(kind), get_args(kind)
    if origin is Literal:
        return _any_of(json.dumps(value) for value in kinds)
    if origin in (Union, types.UnionType):
        return _any_of(_in_words(each) for each in kinds if each is not types.NoneType)
    if origin is tuple:
        count = "" if kinds[-1] is Ellipsis else f"{len(kinds)} times "
        return f"a list, {count}{_in_words(kinds[0])}"
    return _IN_WORDS[kind]


def _any_of(choices: Iterable[str]) -> str:
    return " or ".join(choices)


def _suggestion(name: str, known: Iterable[str]) -> str:
    """Suggests the closest known name, or lists all if none is close."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(sorted(known))}"


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _shown(value: Any) -> str:
    """Returns a value as TOML and JSON write it."""
    return json.dumps(value, default=str)
