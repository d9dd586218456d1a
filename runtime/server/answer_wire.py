"""Between answers on the wire and the runtime's own types; of requests see `runtime.server.wire`."""

from __future__ import annotations

from runtime.errors import collecting_warnings
from runtime.imaging.boxes import Box
from runtime.imaging.pictures import load_picture
from runtime.result import Composite
from runtime.rpc import compositor_pb2 as pb
from runtime.server.events import Event, Preview, Queued, StepDone


def event_message(event: Event, request_id: str) -> pb.CompositeStreamResponse:
    """The message for an event; of `Finished` see `runtime.server.answers`, and `Failed` becomes a status."""
    message = pb.CompositeStreamResponse(request_id=request_id)
    if isinstance(event, Queued):
        message.queued.position = event.position
    elif isinstance(event, StepDone):
        message.step_done.done, message.step_done.total = event.done, event.total
    elif isinstance(event, Preview):
        message.preview.image_index, message.preview.image = event.image_index, event.image
    return message


def composites_from_message(message: pb.CompositeResponse) -> list[Composite]:
    """The finished pictures, decoded."""
    with (
        collecting_warnings()
    ):  # of the pictures that the server made; those of the request are in the message
        pictures = [load_picture(image.image, "the server's picture") for image in message.images]
    return [
        Composite(
            image=picture.pixels,
            seed=image.seed,
            regions=tuple(Box(box.x0, box.y0, box.x1, box.y1) for box in image.regions),
            seconds=dict(message.seconds),
            metadata=picture.metadata,
            warnings=tuple(message.warnings),
            filler=message.filler,
        )
        for picture, image in zip(pictures, message.images)
    ]
