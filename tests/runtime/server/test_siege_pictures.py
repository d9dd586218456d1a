"""Pictures and messages that are small to send and dear to read."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import grpc
import numpy as np
import pytest
from PIL import Image

from benchmarks.support.attacker import COMPOSITE, damaged_exif, scan_bomb, tile_bomb
from runtime.errors import InputError
from runtime.imaging.decoding_cost import MAX_SCANS, count_scans
from runtime.imaging.picture import Picture
from runtime.request import Request
from runtime.rpc import compositor_pb2 as pb
from runtime.rpc.compositor_pb2_grpc import CompositorServiceStub
from runtime.server import decoding
from runtime.server.events import MemoryFullError
from runtime.server.parsing import MAX_FIELDS, count_fields
from tests.support.serving import OBJECT, PATIENCE, SCENE, ServerThread, message, refusal, wait_until

BELOW_THE_LIMIT = scan_bomb(4096, MAX_SCANS - 10)
"""Takes seconds, and is no more than a picture may have."""


def slow_request() -> pb.CompositeRequest:
    """As many slow pictures as a request may have, nearly."""
    slow = pb.Placement(reference=BELOW_THE_LIMIT, reference_mask=BELOW_THE_LIMIT)
    return message(scene=BELOW_THE_LIMIT, placements=[slow] * 4)


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[ServerThread]:
    with ServerThread(tiny_bundle, decode_seconds=1.0, max_steps=60) as server:
        yield server


@pytest.fixture
def stub(server: ServerThread) -> Iterator[Any]:
    with grpc.insecure_channel(server.address) as channel:
        yield CompositorServiceStub(channel)


@pytest.mark.parametrize("count", [2_000, 200_000])
def test_a_message_of_many_fields(server: ServerThread, count: int) -> None:
    with grpc.insecure_channel(server.address) as channel:
        error = refusal(channel.unary_unary(COMPOSITE), b"\x12\x00" * count)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"more than {MAX_FIELDS:,} fields" in error.details()


@pytest.mark.parametrize(
    ("content", "fields"),
    [
        (message().SerializeToString(), 11),
        (pb.CompositeStreamRequest(request=message(), preview_every=3).SerializeToString(), None),
        (b"\x12\x06" + b"\x1a\x04" + b"\x08\x01\x08\x01", 4),  # a box, twice the same field within
        (b"\xfa\x7f\x02ab\xf8\x7f\x05", 2),  # unknown
    ],
)
def test_fields_are_counted_at_every_depth(content: bytes, fields: int | None) -> None:
    descriptor = pb.CompositeRequest.DESCRIPTOR
    if fields is None:
        descriptor, fields = pb.CompositeStreamRequest.DESCRIPTOR, 13
    assert count_fields(content, descriptor) == fields


@pytest.mark.parametrize("within", [b"\x1a\x00", b"\x0b\x0c", b"\x0d\0\0\0\0", b"\x60\x01"])
def test_many_fields_within_a_placement(within: bytes) -> None:
    from google.protobuf.internal.encoder import _VarintBytes  # type: ignore[attr-defined]

    placement = within * MAX_FIELDS
    content = b"\x12" + _VarintBytes(len(placement)) + placement
    with pytest.raises(InputError, match="fields"):
        count_fields(content, pb.CompositeRequest.DESCRIPTOR)


def test_a_scan_bomb(stub: Any) -> None:
    error = refusal(stub.Composite, message(scene=scan_bomb()))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "scans" in error.details()


def test_scans_are_those_of_the_picture_alone() -> None:
    """A thumbnail, and a film after the end, have scans of their own."""
    buffer = io.BytesIO()
    picture = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
    picture.save(buffer, "JPEG", progressive=True, comment=b"\xff\xda" * 1000)
    assert count_scans(buffer.getvalue() + b"\xff\xda\0\0" * 1000) == 10
    picture.save(buffer := io.BytesIO(), "JPEG")
    assert count_scans(buffer.getvalue()) == 1


def test_a_tile_bomb(stub: Any) -> None:
    error = refusal(stub.Composite, message(scene=tile_bomb()))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "tiles" in error.details()


def test_decoding_has_a_limit_of_time(stub: Any) -> None:
    """It is one for all pictures of a request."""
    error = refusal(stub.Composite, slow_request())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "takes more than 1 s to decode" in error.details()
    assert stub.Composite(message(steps=1), timeout=PATIENCE).images


def test_decoding_has_a_limit_of_memory(tiny_bundle: Path) -> None:
    from runtime.request import Request
    from runtime.server.decoding import Decoder

    decoder = Decoder(max_pixels=1 << 24, memory=8 << 20, seconds=10.0)
    large = io.BytesIO()
    Image.fromarray(np.zeros((4096, 4096), np.uint8)).save(large, "PNG")
    try:
        with pytest.raises(InputError, match=r"the scene .*(memory|cannot be decoded)"):
            decoder.decode(Request(large.getvalue(), []), lambda nbytes: None, lambda: True)
        decoded = decoder.decode(Request(SCENE, []), lambda nbytes: None, lambda: True).scene
        assert isinstance(decoded, Picture)
        assert np.array_equal(decoded.rgb, np.asarray(Image.open(io.BytesIO(SCENE))))  # type: ignore[arg-type]
    finally:
        decoder.close()


def test_a_decoder_asks_before_it_reads_and_before_it_hands_over() -> None:
    """Whether the request is still wanted, and whether there is room for its pixels; then it reads the
    next."""

    def refuse(nbytes: int) -> NoReturn:
        assert nbytes == 3 * 80 * 64
        raise MemoryFullError()

    decoder = decoding.Decoder(10**6, decoding.decoder_bytes(10**6, 10**6), PATIENCE)
    try:
        with pytest.raises(InputError, match="the request is over"):
            decoder.decode(Request(SCENE, []), lambda nbytes: None, lambda: False)
        with pytest.raises(MemoryFullError):
            decoder.decode(Request(SCENE, []), refuse, lambda: True)
        assert decoder.decode(Request(SCENE, []), lambda nbytes: None, lambda: True).scene
    finally:
        decoder.close()


def test_the_time_of_a_request_is_given_with_its_first_picture() -> None:
    """What the first leaves of it is for those that follow."""
    seconds = list[float]()

    def read(content: bytes, task: dict[str, Any], given: float) -> Any:
        seconds.append(given)
        return content

    reader = decoding.PictureReader(read, lambda: True, max_pixels=100, seconds=5.0)
    for name in ("scene", "reference", "mask"):
        reader.picture(name, SCENE, f"the {name}")
    assert seconds == [5.0, 0, 0]


def test_a_request_that_is_over_leaves_nothing_behind(tiny_bundle: Path) -> None:
    """Decoding, which has less priority than the networks, is ended with its request."""
    settings = {"decode_seconds": PATIENCE}
    with ServerThread(tiny_bundle, **settings) as server, grpc.insecure_channel(server.address) as channel:
        stub: Any = CompositorServiceStub(channel)
        bombs = [stub.Composite.future(message(scene=BELOW_THE_LIMIT), timeout=PATIENCE) for _ in range(6)]
        wait_until(lambda: any(ticket.decoder for ticket in server.batcher.tickets))
        decoder: Any = next(ticket.decoder for ticket in server.batcher.tickets if ticket.decoder)
        process, ours = decoder._process, os.getpriority(os.PRIO_PROCESS, 0)
        assert os.getpriority(os.PRIO_PROCESS, process) == min(ours + 10, 19)
        for bomb in bombs:
            bomb.cancel()
        wait_until(lambda: not server.batcher.tickets)
        wait_until(lambda: decoder._process != process)  # one that reads to its end keeps its process
        wait_until(lambda: not server.server.ledger.taken)
        assert stub.Composite(message(steps=1), timeout=PATIENCE).images


def test_slow_pictures_of_one_client_do_not_keep_others_waiting(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("open-sesame\nshazam\n")
    settings = {"tokens": str(tmp_path / "tokens"), "decode_seconds": PATIENCE}
    with ServerThread(tiny_bundle, **settings) as server, grpc.insecure_channel(server.address) as channel:
        stub: Any = CompositorServiceStub(channel)
        theirs = {"timeout": PATIENCE, "metadata": (("authorization", "Bearer shazam"),)}
        bombs = [stub.Composite.future(slow_request(), **theirs) for _ in range(4)]
        wait_until(lambda: any(ticket.decoder for ticket in server.batcher.tickets))
        ours = (("authorization", "Bearer open-sesame"),)
        assert stub.Composite(message(steps=1), timeout=PATIENCE, metadata=ours).images
        assert not any(bomb.done() for bomb in bombs)
        for bomb in bombs:
            bomb.cancel()


@pytest.mark.parametrize("field", ["scene", "reference"])
def test_damaged_exif_data_does_no_harm(stub: Any, field: str) -> None:
    picture = damaged_exif()
    if field == "scene":
        request = message(steps=1, scene=picture)
    else:
        mask = Image.open(io.BytesIO(OBJECT)).getchannel("A").resize((80, 64))
        mask.save(buffer := io.BytesIO(), "PNG")
        placement = pb.Placement(
            reference=picture, reference_mask=buffer.getvalue(), box=pb.Box(x0=10, y0=8, x1=60, y1=50)
        )
        request = message(steps=1, placements=[placement])
    assert stub.Composite(request, timeout=PATIENCE).images


def test_decoders_outlive_the_process_that_forked_them(stub: Any) -> None:
    """The next one forks others, and is not asked in vain for those that are not its own."""
    assert stub.Composite(message(), timeout=PATIENCE)
    for _ in range(2):
        process = decoding._SOURCE._process
        assert process is not None
        process.kill()
        process.wait()
        decoder = decoding.Decoder(10**6, decoding.decoder_bytes(10**6, 10**6), 5)
        decoder.start()
        decoding._SOURCE.forget(2**22 + 1)  # a number that no process has
        decoder.close()
        decoder.start()
        decoder.close()
        assert decoding._SOURCE.is_alive
    assert stub.Composite(message(), timeout=PATIENCE)


@pytest.mark.parametrize(("mode", "of_pixel"), [("RGB", 10), ("RGBA", 40), ("CMYK", 40)])
def test_a_large_picture_is_read_in_the_documented_memory(mode: str, of_pixel: int) -> None:
    side, file = 5000, io.BytesIO()
    Image.new(mode, (side, side)).save(file, "TIFF", compression="tiff_deflate")
    content = file.getvalue()
    memory = (128 << 20) + of_pixel * side**2 + 2 * len(content)
    decoder = decoding.Decoder(side**2, memory, PATIENCE)
    try:
        scene: Any = decoder.decode(Request(content, []), lambda _: None, lambda: True).scene
        assert scene.rgb.shape == (side, side, 3)
    finally:
        decoder.close()
