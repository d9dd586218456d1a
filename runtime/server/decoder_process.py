"""Decodes pictures in processes of their own, so that a harmful file only affects these.

The first process imports what decoding needs and forks one process per `Decoder`, which takes milliseconds.
Each of those reads pictures from a socket, under limits of the operating system on its memory and on the
processor's time, and answers with a line of JSON and arrays: nothing that comes back is executed.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError, collecting_warnings
from runtime.imaging.masks import MaskedPicture, TransparentPlace, load_mask
from runtime.imaging.picture import Metadata, Picture
from runtime.imaging.pictures import load_picture

COMMAND_BYTES = 64
"""Size of the commands "start MEMORY", which comes with a socket, and "end PROCESS"; padded with spaces."""

_NICE = 10
"""Pictures that are dear to decode do not take the processor from the networks; others take milliseconds."""

_LENGTH = struct.Struct("!Q")


def send(connection: socket.socket, content: bytes | memoryview) -> None:
    """Sends bytes after their number."""
    connection.sendall(_LENGTH.pack(len(content)))
    connection.sendall(content)


def receive(connection: socket.socket) -> bytearray:
    """Waits for what `send` sends.

    Raises:
        EOFError: the other end is gone.
    """
    buffer = bytearray(_LENGTH.size)
    receive_into(connection, buffer)
    buffer = bytearray(_LENGTH.unpack(buffer)[0])
    receive_into(connection, buffer)
    return buffer


def receive_into(connection: socket.socket, buffer: bytearray | memoryview) -> None:
    """Waits until a buffer is full.

    Raises:
        EOFError: the other end is gone.
    """
    rest = memoryview(buffer)
    while rest:
        count = connection.recv_into(rest)
        if not count:
            raise EOFError
        rest = rest[count:]


def main() -> None:
    """Forks a process for every socket that comes in through standard input; ends with it."""
    commands = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        # supervisors send them to all processes of a service; the server says when to stop
        signal.signal(number, signal.SIG_IGN)
    while True:
        message, descriptors, _, _ = socket.recv_fds(commands, COMMAND_BYTES, 1)
        if not message:
            return
        words = message.decode().split()
        if words[0] == "end":
            # until now it was a zombie at most, so that its number could not become another process's
            with suppress(ChildProcessError):  # it was forked by a process before this one
                os.waitpid(int(words[1]), 0)
            continue
        child = os.fork()
        if child == 0:
            commands.close()
            try:
                _decode_all(socket.socket(fileno=descriptors[0]), memory=int(words[1]))
            finally:
                os._exit(0)
        os.close(descriptors[0])
        send(commands, str(child).encode())


def _decode_all(connection: socket.socket, memory: int) -> None:
    """Decodes pictures until the server closes the socket.

    Args:
        connection: to the server.
        memory: bytes that may be allocated.
    """
    os.nice(_NICE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[0])
        limit = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    while True:
        try:
            task = json.loads(receive(connection))
            content = bytes(receive(connection))
        except EOFError:
            return
        if task["seconds"]:
            used = resource.getrusage(resource.RUSAGE_SELF)
            end = math.ceil(used.ru_utime + used.ru_stime + task["seconds"])
            resource.setrlimit(resource.RLIMIT_CPU, (end, resource.RLIM_INFINITY))
        try:
            with collecting_warnings() as found:
                arrays, facts = _read(content, **task["picture"])
        except InputError as error:
            send(connection, json.dumps({"refusal": str(error)}).encode())
            continue
        finally:
            del content
        shapes = {name: array.shape for name, array in arrays.items()}
        send(connection, json.dumps({"shapes": shapes, "facts": facts, "warnings": found}).encode())
        for array in arrays.values():
            connection.sendall(np.ascontiguousarray(array).data.cast("B"))
        del arrays


def _read(
    content: bytes,
    name: str,
    max_pixels: int,
    is_mask: bool,
    is_transparent: bool = False,
    of: Sequence[Any] = (),
) -> tuple[dict[str, NDArray[np.uint8]], dict[str, Any]]:
    """Returns the arrays of a picture or of a mask, and what JSON can say of it."""
    try:
        if is_mask:
            masked = None
            if of:
                of_name, shape, orientation = of
                masked = MaskedPicture(of_name, tuple(shape), orientation)
            if is_transparent:
                content = TransparentPlace(content)
            inside = load_mask(content, name, max_pixels, masked)
            return {"inside": inside.view(np.uint8)}, {}
        return _parts(load_picture(content, name, max_pixels))
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"{name} needs more memory to decode than is allowed") from error
    except Exception as error:
        raise InputError(f"{name} is damaged") from error


def _parts(picture: Picture) -> tuple[dict[str, NDArray[np.uint8]], dict[str, Any]]:
    metadata = picture.metadata
    arrays = {
        "rgb": picture.rgb,
        "own": None if picture.own is picture.rgb else picture.own,
        "alpha": picture.alpha,
        "icc_profile": np.frombuffer(metadata.icc_profile or b"", np.uint8),
        "exif": np.frombuffer(metadata.exif or b"", np.uint8),
    }
    facts = {
        "kind": picture.kind,
        "orientation": picture.orientation,
        "dpi": metadata.dpi,
        "deep": picture.deep,
    }
    return {name: array for name, array in arrays.items() if array is not None and array.size}, facts


def picture_of(arrays: dict[str, NDArray[np.uint8]], facts: dict[str, Any]) -> Picture:
    """Returns a picture from what is told of it."""
    profile, exif = (arrays[name].tobytes() if name in arrays else None for name in ("icc_profile", "exif"))
    rgb, dpi = arrays["rgb"], facts["dpi"]
    return Picture(
        rgb=rgb,
        alpha=arrays.get("alpha"),
        own=arrays.get("own", rgb),
        metadata=Metadata(profile, exif, tuple(dpi) if dpi else None),
        kind=facts["kind"],
        orientation=facts["orientation"],
        deep=facts["deep"],
    )


if __name__ == "__main__":
    main()
