"""Bodies of requests as fields: JSON, or a form with files. What comes from strangers is counted first."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from runtime.errors import InputError
from runtime.server.parsing import MAX_FIELDS

_MOST_FILES = 64
_LONGEST_LIST = 64
_WHOLE_NUMBER = re.compile(r"\d{1,3}")

Fields = dict[str, Any]
"""Name -> text, number, bytes of a file, list, or fields again."""


def read_fields(content: bytes, content_type: str) -> Fields:
    """Returns the fields of a body.

    Args:
        content: the body.
        content_type: the header.

    Raises:
        InputError: it is neither JSON nor multipart/form-data, is damaged, or has too many fields.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return _form(content, content_type)
    if kind and kind != "application/json" and not kind.endswith("+json"):
        raise InputError(f"a body of JSON or multipart/form-data is expected, not {kind[:100]}")
    return _json(content)


def _json(content: bytes) -> Fields:
    if sum(map(content.count, (b",", b"{", b"["))) > 2 * MAX_FIELDS:
        raise InputError(f"the body has more than {2 * MAX_FIELDS:,} values, the most that are read")
    try:
        found = json.loads(content, object_pairs_hook=_object)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError("the body is not JSON") from error
    if not isinstance(found, dict):
        raise InputError("the body must be a JSON object")
    return found


def _object(pairs: list[tuple[str, Any]]) -> Fields:
    fields: Fields = {}
    for name, value in pairs:
        if name in fields:
            raise InputError(f"the body has the field '{name[:100]}' twice in one object")
        fields[name] = value
    return fields


def _form(content: bytes, content_type: str) -> Fields:
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"").decode("latin-1")

    async def whole() -> AsyncGenerator[bytes, None]:
        yield content

    async def parts() -> list[tuple[str, Any]]:
        # of a charset that the client names, some decoders take time by the square of a text's length
        headers = Headers({"content-type": f'multipart/form-data; boundary="{boundary}"'})
        parser = MultiPartParser(
            headers, whole(), max_files=_MOST_FILES, max_fields=MAX_FIELDS, max_part_size=len(content)
        )
        parser.spool_max_size = len(content) + 1  # no file is written
        form = await parser.parse()
        return [
            (name, value.file.read() if isinstance(value, UploadFile) else value)
            for name, value in form.multi_items()
        ]

    try:
        if not boundary:
            raise ValueError("there is no boundary")
        if not content.rstrip().endswith(b"--"):
            raise ValueError("the last boundary is missing")  # the parser takes what is there
        found = asyncio.run(parts())
    except (MultiPartException, KeyError, UnicodeDecodeError, ValueError) as error:
        raise InputError("the body is not a valid form: multipart/form-data is expected") from error
    fields: Fields = {}
    for name, value in found:
        _assign(fields, name, value)
    return fields


def _assign(fields: Fields, name: str, value: Any) -> None:
    """Sets a field of a form: "placements[0].box", "sampling[steps]", or "image[]", one more of a list."""
    path = re.findall(r"\[\]|[^.\[\]]+", name)
    if not path or path[0] == "[]":
        raise InputError(f"a field of the form has an invalid name: '{name[:100]}'")
    place: Any = fields
    for part, following in zip(path, [*path[1:], None]):
        is_list = following == "[]" or (following is not None and _WHOLE_NUMBER.fullmatch(following))
        empty: Any = value if following is None else [] if is_list else {}
        place = _descend(place, part, empty, name, is_last=following is None)


def _descend(place: Any, part: str, empty: Any, name: str, is_last: bool) -> Any:
    if isinstance(place, list):
        index = len(place) if part == "[]" else int(part) if _WHOLE_NUMBER.fullmatch(part) else -1
        if not 0 <= index <= min(len(place), _LONGEST_LIST):
            raise InputError(f"the form's field '{name[:100]}' has no place in its list")
        if index == len(place):
            place.append(empty)
            return empty
        found = place[index]
    elif isinstance(place, dict):
        if part not in place:
            place[part] = empty
            return empty
        found = place[part]
    else:
        found = None
    if is_last and isinstance(place, dict) and not isinstance(found, dict):
        # as browsers send several values of one name
        values = found if isinstance(found, list) else [found]
        if len(values) >= _LONGEST_LIST:
            raise InputError(f"the form has too many fields '{name[:100]}'")
        place[part] = [*values, empty]
        return empty
    if is_last or type(found) is not type(empty):
        raise InputError(f"the form's field '{name[:100]}' is given twice, or conflicts with other fields")
    return found
