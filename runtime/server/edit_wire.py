"""Converts between the messages of edits (proto/anydoor/v1/compositor.proto) and the runtime's types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.errors import InputError, in_field
from runtime.imaging.target import whole_box
from runtime.parameters import is_neutral
from runtime.request import (
    Action,
    Edit,
    Fill,
    Move,
    Rearrangement,
    Remove,
    Request,
    Reshape,
    Swap,
    SwapPlaces,
    TryOn,
    check_prompt,
)
from runtime.rpc import compositor_pb2 as pb
from runtime.server.placement_wire import (
    message_from_where,
    placement_from_message,
    placement_message,
    where_from_message,
)
from runtime.server.wire import (
    Message,
    file_format_of,
    request_from_message,
    sampling_from_message,
    sampling_message,
)
from runtime.server.wire_values import FORMATS, file_of, number_of, unsigned_of

Asked = Message | pb.EditRequest
"""Requests for pictures."""


def asked_from_message(message: Asked) -> tuple[Request | Edit, str]:
    """Returns the request or the edit, and the name of the file format for its results.

    Raises:
        InputError: as `edit_from_message` and `request_from_message`.
    """
    if isinstance(message, pb.EditRequest):
        return edit_from_message(message)
    return request_from_message(message)


def edit_from_message(message: pb.EditRequest) -> tuple[Edit, str]:
    """Returns the edit, and the name of the file format for its results.

    Raises:
        InputError: the value of an enum is unknown, or an action is missing. All else is checked later.
    """
    with in_field("fill"):
        fill = Fill(message.fill.prompt, sampling_from_message(message.fill.sampling))
    edit = Edit(
        message.scene,
        where_from_message(message.where),
        _action(message),
        fill,
        seed=message.seed if message.HasField("seed") else None,
        sampling=sampling_from_message(message.sampling),
        num_images=message.num_images if message.HasField("num_images") else 1,
    )
    return edit, file_format_of(message.output_format)


def _action(message: pb.EditRequest) -> Action:
    kind = message.WhichOneof("action")
    if kind == "remove":
        return Remove()
    if kind == "move":
        to = message.move.to
        return Move((to.x0, to.y0, to.x1, to.y1), **_passes_of(message.move))
    if kind == "reshape":
        return Reshape(message.reshape.to, **_passes_of(message.reshape))
    if kind == "try_on":
        with in_field("try_on"):
            return TryOn(placement_from_message(message.try_on))
    what, passes = message.swap.WhichOneof("what"), _passes_of(message.swap)
    if what == "placement":
        for name, value in passes.items():
            with in_field(f"swap.{name}"):
                if not is_neutral(name, value):
                    raise InputError(f"another object has a {name} of its own: set placement.{name}")
        with in_field("swap.placement"):
            return Swap(placement_from_message(message.swap.placement))
    if what == "other":
        return SwapPlaces(where_from_message(message.swap.other), **passes)
    with in_field("action" if kind is None else "swap"):
        raise InputError("no edit is given: set one of the fields")


def _passes_of(message: pb.Move | pb.Reshape | pb.Swap) -> dict[str, Any]:
    """Returns how an object of the scene is drawn, as far as the message says it."""
    return {name: getattr(message, name) for name in ("refine", "strength") if message.HasField(name)}


def message_from_edit(edit: Edit, file_format: str = "PNG") -> pb.EditRequest:
    """Returns the message for an edit.

    Raises:
        InputError: a file cannot be read, or a name, a number or a prompt cannot be sent.
    """
    with in_field("scene"):
        scene = file_of(edit.scene, "the scene")
    with in_field("where"):
        where = message_from_where(edit.where)
    with in_field("fill"):
        fill = pb.Fill(prompt=check_prompt(edit.fill.prompt), sampling=sampling_message(edit.fill.sampling))
    try:
        return pb.EditRequest(
            scene=scene,
            where=where,
            fill=fill,
            sampling=sampling_message(edit.sampling),
            seed=unsigned_of(edit.seed, "seed", bits=64),
            num_images=unsigned_of(edit.num_images, "num_images"),
            output_format=number_of(file_format, FORMATS, "output_format", "image format"),
            **_action_fields(edit.action),
        )
    except (ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the edit has a number that cannot be sent: {error}") from error


def _action_fields(action: Action) -> Mapping[str, Any]:
    if isinstance(action, Remove):
        return {"remove": pb.Remove()}
    if isinstance(action, Move):
        with in_field("move.to"):
            to = pb.Box(**whole_box(action.to)._asdict())
        return {"move": pb.Move(to=to, **_passes("move", action))}
    if isinstance(action, Reshape):
        with in_field("reshape.to"):
            outline = file_of(action.to, "the new outline")
        return {"reshape": pb.Reshape(to=outline, **_passes("reshape", action))}
    if isinstance(action, SwapPlaces):
        with in_field("swap.other"):
            other = message_from_where(action.other)
        return {"swap": pb.Swap(other=other, **_passes("swap", action))}
    with in_field("try_on" if isinstance(action, TryOn) else "swap.placement"):
        placement = placement_message(action.placement)
    return {"try_on": placement} if isinstance(action, TryOn) else {"swap": pb.Swap(placement=placement)}


def _passes(name: str, action: Rearrangement) -> dict[str, Any]:
    with in_field(name):
        return {"refine": unsigned_of(action.refine, "refine"), "strength": action.strength}
