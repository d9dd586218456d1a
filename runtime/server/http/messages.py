"""Fields of a body as messages of the wire, proto/anydoor/v1/compositor.proto, whose names they have.

Pictures are files of a form, or base64, also as a data URL. Names of enums are in lower case without their
prefix. Boxes and clicks are also lists of their numbers, or those in a text: "!3,4" is a click that is not on
the object. A file stands for a view, and a list of files for a reference and its views. The fields of a
single placement may stand beside the scene, as may those of `where`.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from runtime.errors import InputError, in_field
from runtime.imaging.mask_levels import check_mask_level
from runtime.rpc import compositor_pb2 as pb
from runtime.server.edit_wire import Asked
from runtime.server.http.body import Fields
from runtime.server.wire_values import LEVELS

_WHOLE = {
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_SINT32: (-(2**31), 2**31 - 1),
}
_LISTED = {"Box": ("x0", "y0", "x1", "y1"), "Point": ("x", "y"), "TimestepInterval": ("first", "last")}
"""Messages that a list of their values stands for, and the names of these."""
_OUTSIDE = "!"
_NUMBER = re.compile(r"[+-]?(\d{1,300}(\.\d{0,300})?|\.\d{1,300})(e[+-]?\d{1,9})?", re.ASCII | re.IGNORECASE)
"""A number as text; Python would take underscores, digits of other scripts and names, too."""
_Message = TypeVar("_Message", bound=Asked | pb.SegmentRequest)

PLACEMENT: frozenset[str] = frozenset(pb.Placement.DESCRIPTOR.fields_by_name)
SAMPLING: frozenset[str] = frozenset(pb.Sampling.DESCRIPTOR.fields_by_name)
WHERE: frozenset[str] = frozenset(pb.Where.DESCRIPTOR.fields_by_name)
ACTIONS = frozenset(field.name for field in pb.EditRequest.DESCRIPTOR.oneofs_by_name["action"].fields)


def kind_of(fields: Fields) -> type[Asked]:
    """Returns the message that a body is: without a scene, of a drawing; with an action, of an edit."""
    given = {name for name, value in fields.items() if value is not None}
    if "scene" not in given:
        return pb.DrawRequest
    return pb.EditRequest if ACTIONS & given else pb.CompositeRequest


def message_of(fields: Fields, kind: type[_Message]) -> tuple[_Message, int]:
    """Returns the request that a body asks for, and the steps between previews.

    Raises:
        InputError: names the field.
    """
    fields = _without_null(fields)
    with in_field("preview_every"):
        every = whole_of(fields.pop("preview_every", 0), 0, 2**32 - 1)
    if kind is pb.CompositeRequest and "placements" not in fields:
        fields["placements"] = [_taken(fields, PLACEMENT)]
    return _filled(kind(), fields), every


def segment_message(fields: Fields) -> pb.SegmentRequest:
    """Returns the message of a body that asks where an object is; likewise."""
    return _filled(pb.SegmentRequest(), _without_null(fields))


def _without_null(fields: Fields) -> Fields:
    """Returns the fields that are set: JSON's null says that one is not."""
    return {name: value for name, value in fields.items() if value is not None}


def _taken(fields: Fields, names: frozenset[str]) -> Fields:
    """Returns the fields of some names, taken out of the others."""
    return {name: fields.pop(name) for name in list(fields) if name in names}


def _filled(message: _Message, fields: Fields) -> _Message:
    if "where" in message.DESCRIPTOR.fields_by_name and "where" not in fields:
        fields["where"] = _taken(fields, WHERE) or None
    _fill(message, fields)
    return message


def _fill(message: Any, fields: Any) -> None:
    descriptor: Descriptor = message.DESCRIPTOR
    fields = _named(descriptor.name, fields)
    if not isinstance(fields, Mapping):
        raise InputError("an object with fields is expected")
    known = {field.name: field for field in descriptor.fields}
    for name, value in fields.items():
        # descriptor.fields_by_name raises SystemError for half of a surrogate pair
        if name not in known:
            with in_field(str(name)[:100]):
                raise InputError(f"there is no field '{str(name)[:100]}': see /openapi.json")
        if value is None:
            continue
        _set(message, known[name], value)
    for oneof in descriptor.oneofs:
        given = [field.name for field in oneof.fields if fields.get(field.name) is not None]
        if len(given) > 1:
            raise InputError(f"give either {' or '.join(given)}, not both")


def _named(kind: str, given: Any) -> Any:
    """Expands the short form of a message into its fields."""
    if kind == "Clicks" and isinstance(given, str | list):
        return {"points": given}
    if kind == "View" and isinstance(given, str | bytes):
        return {"picture": given}
    if kind == "Placement" and isinstance(given, Mapping) and isinstance(given.get("reference"), list):
        return _with_views(given)
    if kind not in _LISTED or isinstance(given, Mapping):
        return given
    if isinstance(given, str):
        if kind == "Point" and given.startswith(_OUTSIDE):
            return {**_named(kind, given.removeprefix(_OUTSIDE).split(",")), "outside": True}
        given = given.split(",")
    names = _LISTED[kind]
    if not isinstance(given, list):
        raise InputError(f"{len(names)} numbers are expected")
    if len(given) != len(names):
        raise InputError(f"{len(names)} numbers are expected, not {len(given)}")
    return dict(zip(names, given))


def _with_views(placement: Mapping[str, Any]) -> Fields:
    """Returns a placement whose reference is a list: the first of it, and views."""
    references = placement["reference"]
    with in_field("reference"):
        if not references:
            raise InputError("a file or a list of files is expected; the list is empty")
        if placement.get("views") is not None:
            raise InputError("give several pictures of an object either here or in views, not in both")
    return {**placement, "reference": references[0], "views": references[1:]}


def _set(message: Any, field: FieldDescriptor, value: Any) -> None:
    if field.is_repeated:
        with in_field(field.name):
            if isinstance(value, str | bytes):  # of a form, the only one
                value = [value]
            if not isinstance(value, list):
                raise InputError("a list is expected")
        for index, each in enumerate(value):
            with in_field(f"{field.name}[{index}]"):
                _fill(getattr(message, field.name).add(), each)
        return
    with in_field(field.name):
        if field.message_type is None:
            setattr(message, field.name, _value(field, value))
            return
        within = getattr(message, field.name)
        if field.message_type.fields or isinstance(value, Mapping):
            _fill(within, value)
        elif not truth_of(value):  # it has no fields: it is there, or it is not
            return
        within.SetInParent()


def _value(field: FieldDescriptor, value: Any) -> Any:
    if field.type == FieldDescriptor.TYPE_BYTES:
        return file_of(value)
    if field.type == FieldDescriptor.TYPE_STRING:
        return text_of(value)
    if field.enum_type is not None:
        return _number_of(field.enum_type, value)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return truth_of(value)
    if field.type in _WHOLE:
        return whole_of(value, *_WHOLE[field.type])
    return _number(value)


def file_of(value: Any) -> bytes:
    """Returns the bytes of a picture's file: of a form, or in base64, also as a data URL.

    Raises:
        InputError: it is neither.
    """
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise InputError("a file, or one in base64, is expected")
    content = value.partition(",")[2] if value.startswith("data:") else value
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError("a file, or one in base64, is expected; this is not base64") from error


def text_of(value: Any) -> str:
    """Returns a text.

    Raises:
        InputError: it is not text, or has half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise InputError("text is expected")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise InputError("the text has half of a surrogate pair, which is not a character: remove it")
    return value


def stream_of(fields: Fields) -> bool:
    """Removes `stream` from the fields of a body, and returns whether to answer with events.

    Raises:
        InputError: it is neither true nor false.
    """
    with in_field("stream"):
        given = fields.pop("stream", None)
        return given is not None and truth_of(given)


def truth_of(value: Any) -> bool:
    """True or false, also of a form.

    Raises:
        InputError: it is neither.
    """
    text = str(value).lower() if isinstance(value, bool | str) else ""
    if text not in ("true", "false"):
        raise InputError("true or false is expected")
    return text == "true"


def whole_of(value: Any, least: int, most: int) -> int:
    """Returns a whole number, which a form gives as text.

    Raises:
        InputError: it is not a whole number, or is out of range.
    """
    found = _of_text(value) if isinstance(value, str) else value
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    if not isinstance(found, int) or isinstance(found, bool) or not least <= found <= most:
        raise InputError(f"a whole number from {least} to {most} is expected")
    return found


def _of_text(text: str) -> int | float | None:
    """Returns the number that a text is, or None."""
    text = text.strip()
    if not _NUMBER.fullmatch(text):
        return None
    return int(text) if text.lstrip("+-").isdecimal() else float(text)


def choice_of(value: Any, names: Collection[str]) -> str:
    """Returns a value that is one of `names`.

    Raises:
        InputError: it is not one of them.
    """
    if isinstance(value, str) and value in names:
        return value
    # other values may be nested too deep to print
    given = f"'{value[:100]}'" if isinstance(value, str) else "such value"
    raise InputError(f"there is no {given}: choose one of {', '.join(names)}")


def enum_names(enum: EnumDescriptor) -> list[str]:
    """Returns the names of an enum's values in a body, except the unspecified one."""
    prefix = enum.values[0].name.removesuffix("UNSPECIFIED")
    return [value.name.removeprefix(prefix).lower() for value in enum.values[1:]]


def _number_of(enum: EnumDescriptor, value: Any) -> int:
    names = enum_names(enum)
    if enum.name == "MaskLevel" and (level := _level(value)) is not None:
        return int(LEVELS[check_mask_level(level)])
    name = choice_of(value.lower() if isinstance(value, str) else value, names)
    return int(enum.values[1 + names.index(name)].number)


def _level(value: Any) -> int | None:
    """Returns the mask level that is given by its number, also as text; None for anything else."""
    found = _of_text(value) if isinstance(value, str) else value
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    if isinstance(found, int) and not isinstance(found, bool) and abs(found) < 2**31:
        return found
    return None


def _number(value: Any) -> float:
    found = _of_text(value) if isinstance(value, str) else value
    try:
        if isinstance(found, int | float) and not isinstance(found, bool):
            return float(found)
    except OverflowError:
        pass
    raise InputError("a number is expected")


# --- answers ----------------------------------------------------------------------------------------------


def plain(message: Any) -> Any:
    """Returns a message as JSON has it: of its names, with the enums' short ones, boxes as lists, files in
    base64."""
    descriptor: Descriptor = message.DESCRIPTOR
    if descriptor.name in _LISTED:
        return [getattr(message, name) for name in _LISTED[descriptor.name]]
    return {field.name: _plain(field, value) for field, value in message.ListFields()}


def _plain(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return dict(value)
    if field.is_repeated:
        return [_plain_value(field, each) for each in value]
    return _plain_value(field, value)


def _plain_value(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is not None:
        return plain(value)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return base64.b64encode(value).decode()
    if field.enum_type is not None:
        by_number: Sequence[Any] = [each.name for each in field.enum_type.values if each.number == value]
        prefix = field.enum_type.values[0].name.removesuffix("UNSPECIFIED")
        return str(by_number[0]).removeprefix(prefix).lower()
    return value
