"""Defines the schema of manifest.json: its fields, and their types and ranges.

What they mean is in docs/model-format.md. Fields that are not in the schema are ignored, as JSON Schema does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import PurePosixPath

from engines.spec import DTYPES, ROLES

Check = Callable[[str, object], None]
"""Given where a value stands and the value, raises ValueError with a sentence if it cannot be there."""

_MANY = 4096
"""Entries of a list or an object; the largest have one per input of a graph."""

_LARGEST_BYTES = 1 << 50
_LARGEST_SIZE = 1 << 24
_LONGEST_PATH = 200
LONGEST_TEXT = 500
"""Characters."""
LARGEST_BATCH = 4096
_LARGEST_NUMBER = 1e300
"""JSON has whole numbers that no float can hold."""


def whole(least: int, most: int) -> Check:
    """Returns a whole number, the bounds included."""

    def check(where: str, value: object) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise _wrong(where, f"a whole number from {least} to {most}", value)

    return check


def number(where: str, value: object) -> None:
    """A finite number that is not negative."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= _LARGEST_NUMBER:
        raise _wrong(where, "a number that is not negative", value)


def text(where: str, value: object) -> None:
    """Text that can be shown: at most `LONGEST_TEXT` printable characters."""
    if not isinstance(value, str) or len(value) > LONGEST_TEXT or not value.isprintable():
        raise _wrong(where, "printable text", value)


def name(where: str, value: object) -> None:
    """Text that is not empty."""
    text(where, value)
    if not value:
        raise _wrong(where, "a name", value)


def one_of(choices: Collection[str]) -> Check:
    """Returns one of several texts."""

    def check(where: str, value: object) -> None:
        if not isinstance(value, str) or value not in choices:
            raise _wrong(where, f"one of {', '.join(choices)}", value)

    return check


def sequence(of: Check, least: int = 0, most: int = _MANY) -> Check:
    """Returns a list."""

    def check(where: str, value: object) -> None:
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise _wrong(where, f"a list of {least} to {most} entries", value)
        for index, item in enumerate(value):
            of(f"{where}[{index}]", item)

    return check


def graph_name(where: str, value: object) -> None:
    """The name of a graph: files are named after it."""
    if not isinstance(value, str) or not re.fullmatch(r"\w[\w.+-]{0,99}", value):
        raise _wrong(where, "at most 100 letters, digits, and _ . + -, a letter, digit or _ first", value)


def table(of: Check, key_of: Check = name) -> Check:
    """Returns an object whose keys are names."""

    def check(where: str, value: object) -> None:
        for key, item in _object(where, value).items():
            key_of(f"a key of {where or 'it'}", key)
            of(_join(where, key), item)

    return check


def record(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """Returns an object with certain fields, and maybe others."""

    def check(where: str, value: object) -> None:
        fields = _object(where, value)
        for key, of in required.items():
            if key not in fields:
                raise ValueError(f"'{_join(where, key)}' is missing")
            of(_join(where, key), fields[key])
        for key, of in (optional or {}).items():
            if key in fields:
                of(_join(where, key), fields[key])

    return check


def path(where: str, value: object) -> None:
    """Names a file in the bundle."""
    if not isinstance(value, str) or not re.fullmatch(rf"[\w.+ /-]{{1,{_LONGEST_PATH}}}", value):
        raise _wrong(where, f"a path of at most {_LONGEST_PATH} letters, digits, and . _ + - /", value)
    relative = PurePosixPath(value)
    if relative.is_absolute() or ".." in relative.parts:
        raise ValueError(f"path '{value}' leaves the bundle")


def digest(where: str, value: object) -> None:
    """A SHA-256, hexadecimal, or nothing, as for a file that a skeleton leaves out."""
    if not isinstance(value, str) or not re.fullmatch(r"([0-9a-f]{64})?", value):
        raise _wrong(where, "a SHA-256 of 64 hexadecimal digits", value)


def dimension(where: str, value: object) -> None:
    """A size, or the name of a variable one."""
    (name if isinstance(value, str) else whole(1, _LARGEST_SIZE))(where, value)


def anything(where: str, value: object) -> None:
    """Whatever JSON can say."""


def _object(where: str, value: object) -> dict[str, object]:
    if not isinstance(value, dict) or len(value) > _MANY:
        raise _wrong(where, f"an object of at most {_MANY} fields", value)
    return value


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _wrong(where: str, wanted: str, value: object) -> ValueError:
    shown = repr(value)
    return ValueError(f"{where or 'it'} must be {wanted}, not {shown[:60]}{'...' * (len(shown) > 60)}")


_FILE = record({"path": path, "bytes": whole(0, _LARGEST_BYTES), "sha256": digest})

_TENSOR = record(
    {"name": name, "dtype": one_of(DTYPES), "shape": sequence(dimension, most=8)}, {"file_name": text}
)

_GRAPH = record(
    {
        "role": one_of(ROLES),
        "inputs": sequence(_TENSOR),
        "outputs": sequence(_TENSOR),
        "banks": sequence(record({"name": name, "tensors": sequence(name), "index": name})),
        "per_step": sequence(name),
        "feedback": table(name),
        "files": sequence(_FILE, least=1),
        "error": table(number),
        "build_seconds": number,
        "scratch_bytes": table(whole(0, _LARGEST_BYTES)),
    },
    {"variants": table(_FILE), "made_from": digest},
)

MANIFEST_2 = record(
    {
        "producer": text,
        "system": name,
        "backend": name,
        "backend_version": text,
        "target": name,
        "precision": one_of(("fp32", "fp16")),
        "max_batch": whole(1, LARGEST_BATCH),
        "dimensions": table(whole(1, 4096)),
        "graphs": table(_GRAPH, graph_name),
        "constants": _FILE,
        "defaults": table(anything),
        "checkpoint": record({}, {"file": text, "sha256": digest}),
        "architecture": table(anything),
        "schedule": table(anything),
    },
    {"tokenizer": record({"merges": _FILE, "pad": name, "any_case": sequence(name)})},
)
"""A manifest of format version 2."""
