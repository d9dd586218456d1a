"""Answers as bytes: a finished picture is copied once on its way from its file to the transport."""

from __future__ import annotations

from collections.abc import Iterator

from runtime.rpc import compositor_pb2 as pb
from runtime.server.events import Finished

_RESULT = pb.CompositeStreamResponse.DESCRIPTOR.fields_by_name["result"].number
_BYTES = 2  # wire type


def answer(finished: Finished, request_id: str) -> bytes:
    """Returns a serialized `CompositeResponse`; the files in `finished` are dropped on the way."""
    return b"".join(_parts(finished, request_id))


def stream_answer(finished: Finished, request_id: str) -> bytes:
    """Returns the same as the last `CompositeStreamResponse`."""
    head = pb.CompositeStreamResponse(request_id=request_id).SerializeToString()
    parts = list(_parts(finished, request_id))
    length = _varint(sum(map(len, parts)))
    return b"".join([head, _varint(_RESULT << 3 | _BYTES), length, *parts])


def _parts(finished: Finished, request_id: str) -> Iterator[bytes]:
    """Yields messages that are one when they stand one after the other: repeated fields are joined."""
    while finished.images:
        image = finished.images.pop(0)
        message = pb.CompositeImage(
            image=image.image,
            seed=image.seed,
            regions=[pb.Box(**region._asdict()) for region in image.regions],
        )
        del image
        yield pb.CompositeResponse(images=[message]).SerializeToString()
    rest = pb.CompositeResponse(
        request_id=request_id, seconds=finished.seconds, warnings=finished.warnings, filler=finished.filler
    )
    yield rest.SerializeToString()


def _varint(value: int) -> bytes:
    content = bytearray()
    while value > 0x7F:
        content.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*content, value])
