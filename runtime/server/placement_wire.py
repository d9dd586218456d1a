"""Converts between the messages of placements and the runtime's types."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from runtime.errors import InputError, in_field
from runtime.imaging.clicks import Click, check_clicks
from runtime.imaging.sources import PictureLike
from runtime.imaging.target import whole_box
from runtime.request import AUTOMATIC, Placement, View, Where, check_prompt, is_automatic
from runtime.rpc import compositor_pb2 as pb
from runtime.server.wire_values import (
    EDGES,
    LEVELS,
    MODES,
    file_of,
    level_of,
    name_of,
    number_of,
    unsigned_of,
)


def placement_from_message(message: pb.Placement) -> Placement:
    """Returns the placement in a message; raises for unknown values of enums."""
    target = message.WhichOneof("target")
    box = message.box
    ratios = {f"{field.name}_ratio": value for field, value in message.ratios.ListFields()}
    clicks, views = message.reference_clicks, []
    for index, view in enumerate(message.views):
        with in_field(f"views[{index}]"):
            views.append(_view_from_message(view))
    return Placement(
        reference=message.reference or None,
        reference_mask=_mask_of(message.reference_mask, message.automatic_mask),
        reference_clicks=clicks_from_message(clicks) if clicks else None,
        views=views or None,
        prompt=message.prompt if message.HasField("prompt") else None,
        **negative_prompt_of(message),
        box=(box.x0, box.y0, box.x1, box.y1) if target == "box" else None,
        mask=message.mask if target == "mask" else None,
        mode=name_of(message.mode, MODES, "mode", "placement mode"),
        mask_level=name_of(message.mask_level, LEVELS, "mask_level", "mask level"),
        edge=name_of(message.edge, EDGES, "edge", "edge"),
        refine=message.refine if message.HasField("refine") else None,
        strength=message.strength if message.HasField("strength") else None,
        keep_specks=message.keep_specks,
        **ratios,
    )


def _view_from_message(message: pb.View) -> View:
    clicks = message.clicks
    mask = _mask_of(message.mask, message.automatic_mask)
    return View(message.picture, mask, clicks_from_message(clicks) if clicks else None)


def _mask_of(mask: bytes, automatic: bool) -> bytes | str | None:
    if automatic and mask:
        with in_field("automatic_mask"):
            raise InputError("automatic_mask cannot be used with a reference mask: leave one out")
    return mask or (AUTOMATIC if automatic else None)


def negative_prompt_of(message: pb.Placement | pb.DrawRequest) -> dict[str, Any]:
    """Returns the negative prompt, if there is one."""
    return {"negative_prompt": message.negative_prompt} if message.HasField("negative_prompt") else {}


def placement_message(placement: Placement) -> pb.Placement:
    """Returns the message for a placement.

    Raises:
        InputError: something about it cannot be sent.
    """
    if placement.box is not None and placement.mask is not None:
        raise InputError("a placement needs either a box or a mask, not both")
    mask, reference = placement.mask, placement.reference
    box, views = None, []
    if placement.box is not None:
        with in_field("box"):
            box = pb.Box(**whole_box(placement.box)._asdict())
    for index, view in enumerate(placement.views or ()):
        with in_field(f"views[{index}]"):
            mask_of_view = _mask_fields("mask", view.mask, view.clicks, "clicks")
            views.append(pb.View(picture=file_of(view.picture, "the view"), **mask_of_view))
    return pb.Placement(
        reference=None if reference is None else file_of(reference, "the reference"),
        **_mask_fields(
            "reference_mask", placement.reference_mask, placement.reference_clicks, "reference_clicks"
        ),
        views=views,
        **checked_prompts(placement),
        box=box,
        mask=None if mask is None else file_of(mask, "the scene mask"),
        mode=number_of(placement.mode, MODES, "mode", "mode"),
        mask_level=level_of(placement.mask_level),
        edge=number_of(placement.edge, EDGES, "edge", "edge"),
        refine=unsigned_of(placement.refine, "refine"),
        strength=placement.strength,
        ratios=pb.Ratios(
            reference=placement.reference_ratio, box=placement.box_ratio, crop=placement.crop_ratio
        ),
        keep_specks=placement.keep_specks,
    )


def _mask_fields(
    name: str, mask: PictureLike | None, clicks: Sequence[Sequence[int]] | None, clicks_name: str
) -> dict[str, Any]:
    """Returns the mask or clicks of a reference."""
    fields: dict[str, Any] = {}
    if clicks is not None:
        with in_field(clicks_name):
            fields[clicks_name] = points_of(clicks)
    if is_automatic(mask):
        fields["automatic_mask"] = True
    elif mask is not None:
        fields[name] = file_of(mask, "the reference mask")
    return fields


def checked_prompts(placement: Placement) -> dict[str, Any]:
    """Returns the prompts of a placement; raises for what is no text."""
    prompts = {"prompt": placement.prompt, "negative_prompt": placement.negative_prompt}
    for name, prompt in prompts.items():
        with in_field(name):
            if prompt is not None:
                check_prompt(prompt)
    return prompts


def where_from_message(message: pb.Where) -> Where:
    """Reads the selection of an object from a message."""
    box, what = message.box, message.WhichOneof("what")
    return Where(
        box=(box.x0, box.y0, box.x1, box.y1) if what == "box" else None,
        mask=message.mask if what == "mask" else None,
        clicks=clicks_from_message(message.clicks.points) if what == "clicks" else None,
    )


def message_from_where(where: Where) -> pb.Where:
    """Returns the message for where an object is.

    Raises:
        InputError: several things say it, or one cannot be sent.
    """
    if sum(given is not None for given in vars(where).values()) > 1:
        raise InputError("give only one of box, mask and clicks to select the object")
    if where.box is not None:
        with in_field("box"):
            return pb.Where(box=pb.Box(**whole_box(where.box)._asdict()))
    if where.clicks is not None:
        with in_field("clicks"):
            return pb.Where(clicks=pb.Clicks(points=points_of(where.clicks)))
    return pb.Where(mask=None if where.mask is None else file_of(where.mask, "the mask"))


def clicks_from_message(points: Iterable[pb.Point]) -> list[Click]:
    """Clicks from points."""
    return [Click(point.x, point.y, not point.outside) for point in points]


def points_of(clicks: Sequence[Sequence[int]]) -> list[pb.Point]:
    """Returns points from clicks.

    Raises:
        InputError: one is no click, or cannot be sent.
    """
    return [pb.Point(x=click.x, y=click.y, outside=not click.inside) for click in check_clicks(clicks)]
