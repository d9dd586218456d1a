"""Decodes untrusted pictures in processes that can be stopped; see `runtime.server.decoder_process`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError, in_field, warn
from runtime.imaging.decoding import UPRIGHT
from runtime.imaging.masks import TransparentPlace
from runtime.imaging.picture import Picture
from runtime.imaging.target import SCENE_MASK
from runtime.request import Placement, Request, Where
from runtime.server.decoder_process import COMMAND_BYTES, picture_of, receive, receive_into, send
from runtime.validation import in_placement

_BYTES_PER_PIXEL = 40
_BASE_BYTES = 128 << 20
"""That decoding takes at most; see `runtime.imaging.decoding`."""

Charge = Callable[[int], object]
"""Told the bytes of pixels that are about to come; raises to refuse them."""


def decoder_bytes(max_pixels: int, max_message_bytes: int) -> int:
    """Returns the memory that a decoding process may allocate."""
    return _BASE_BYTES + _BYTES_PER_PIXEL * max_pixels + 2 * max_message_bytes


class Decoder:
    """Decodes the pictures of one request after the other, in one thread; any other may call `kill`."""

    def __init__(self, max_pixels: int, memory: int, seconds: float) -> None:
        """Keeps the limits.

        Args:
            max_pixels: of each picture and mask.
            memory: bytes that the process may allocate; see `decoder_bytes`.
            seconds: of a processor's time, for all pictures of a request.
        """
        self._max_pixels = max_pixels
        self._memory = memory
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: int | None = None
        self._is_killed = False
        self._connection: socket.socket

    def decode(self, request: Request, charge: Charge, is_wanted: Callable[[], bool]) -> Request:
        """Returns the request with `Picture`s and masks in place of its files; `warn` tells what is noticed.

        Args:
            request: its pictures are the bytes of files; what else they are stays as it is.
            charge: may refuse pixels before they come.
            is_wanted: asked before every picture.

        Raises:
            InputError: a picture cannot be decoded within the limits, or the request is no longer wanted.
        """
        read = self.reader(charge, is_wanted)
        scene = read.picture("scene", request.scene, "the scene")
        placements = []
        for index, placement in enumerate(request.placements):
            with in_placement(request, index):
                placements.append(read.placement(placement, scene))
        return replace(request, scene=upright(scene), placements=placements)

    def reader(self, charge: Charge, is_wanted: Callable[[], bool]) -> PictureReader:
        """Reads the pictures of one request; arguments as of `decode`."""
        self.start()
        return PictureReader(partial(self._read, charge=charge), is_wanted, self._max_pixels, self._seconds)

    def kill(self) -> None:
        """Ends the process, whatever it is at, without waiting; who decodes notices."""
        with self._lock, contextlib.suppress(OSError):
            if self._process is not None and _SOURCE.is_alive:
                # its number stays taken until `close`
                os.kill(self._process, signal.SIGKILL)
                self._is_killed = True

    def start(self) -> None:
        """Starts its process, if there is none that lives."""
        if self._is_killed:
            self.close()
        if self._process is None:
            self._connection, theirs = socket.socketpair()
            with theirs:
                process = _SOURCE.fork(theirs, self._memory)
            with self._lock:
                self._process = process

    def close(self) -> None:
        """Ends the process; the next request starts another."""
        self.kill()
        with self._lock:
            process, self._process, self._is_killed = self._process, None, False
        if process is not None:
            self._connection.close()
            _SOURCE.forget(process)

    def _read(
        self, content: bytes, task: dict[str, Any], seconds: float, charge: Charge
    ) -> Picture | NDArray[np.bool_]:
        connection = self._connection
        try:
            send(connection, json.dumps({"picture": task, "seconds": seconds}).encode())
            send(connection, content)
            answer = json.loads(receive(connection))
            if "refusal" in answer:
                raise InputError(answer["refusal"])
            arrays = {name: np.empty(shape, np.uint8) for name, shape in answer["shapes"].items()}
            charge(sum(array.nbytes for array in arrays.values()))
            for array in arrays.values():
                receive_into(connection, array.data.cast("B"))
        except InputError:
            raise
        except (EOFError, OSError) as error:
            self.close()
            raise InputError(
                f"{task['name']} takes more than {self._seconds:g} s to decode, or cannot be decoded"
            ) from error
        except Exception:
            # what still comes of this picture must not be taken for the next one
            self.close()
            raise
        for text in answer["warnings"]:
            warn(text)
        return arrays["inside"].view(np.bool_) if task["is_mask"] else picture_of(arrays, answer["facts"])


def end_decoders() -> None:
    """Ends the process that forks decoders; the next decoder starts another."""
    _SOURCE.end()


class PictureReader:
    """Reads the pictures of one request, one after the other; what is in memory stays as it is."""

    def __init__(
        self,
        read: Callable[[bytes, dict[str, Any], float], Picture | NDArray[np.bool_]],
        is_wanted: Callable[[], bool],
        max_pixels: int,
        seconds: float,
    ) -> None:
        """Keeps how it reads, and the limits; see `Decoder`."""
        self._read = read
        self._is_wanted = is_wanted
        self._max_pixels = max_pixels
        self._seconds = seconds

    def picture(self, field: str, source: Any, name: str) -> Any:
        """Returns a picture, with the orientation that was undone; `name` is for refusals."""
        return self._load(field, source, {"name": name, "is_mask": False})

    def mask(self, field: str, source: Any, name: str, of: Any, of_name: str) -> Any:
        """Returns the mask of a picture, upright, if that is one."""
        is_transparent = isinstance(source, TransparentPlace)
        task: dict[str, Any] = {"name": name, "is_mask": True, "is_transparent": is_transparent}
        if isinstance(of, Picture):
            task["of"] = (of_name, of.rgb.shape, of.orientation)
        return self._load(field, source, task)

    def placement(self, placement: Placement, scene: Any) -> Placement:
        """Returns a placement with its pictures."""
        given = placement
        reference = self.picture("reference", given.reference, "the reference")
        inside = self.mask(
            "reference_mask", given.reference_mask, "the reference mask", reference, "the reference"
        )
        mask = self.mask("mask", given.mask, SCENE_MASK, scene, "the scene")
        views = []
        for index, view in enumerate(given.views or ()):
            with in_field(f"views[{index}]"):
                picture = self.picture("picture", view.picture, "the view")
                shown = self.mask("mask", view.mask, "the mask of the view", picture, "the view")
                views.append(replace(view, picture=upright(picture), mask=shown))
        return replace(
            given, reference=upright(reference), reference_mask=inside, mask=mask, views=views or None
        )

    def where(self, where: Where, scene: Any) -> Where:
        """Selects an object of a scene by its mask."""
        return replace(where, mask=self.mask("mask", where.mask, "the mask", scene, "the scene"))

    def _load(self, field: str, source: Any, task: dict[str, Any]) -> Any:
        if not isinstance(source, bytes):
            return source
        with in_field(field):
            if not self._is_wanted():
                raise InputError("the request is over")
            found = self._read(source, {**task, "max_pixels": self._max_pixels}, self._seconds)
        self._seconds = 0  # the rest of them is for the pictures that follow
        return found


def upright(picture: Any) -> Any:
    """Returns the picture without the orientation that was undone: its masks are turned as it was."""
    return replace(picture, orientation=UPRIGHT) if isinstance(picture, Picture) else picture


class _Source:
    """The process that forks decoders: one in all, started when it is needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._commands: socket.socket

    def fork(self, connection: socket.socket, memory: int) -> int:
        """Starts a decoder at the other end of a socket; returns its process id."""
        with self._lock:
            if not self.is_alive:
                self._start()
            command = f"start {memory}".encode().ljust(COMMAND_BYTES)
            socket.send_fds(self._commands, [command], [connection.fileno()])
            return int(receive(self._commands))

    @property
    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    def forget(self, process: int) -> None:
        """Gives the number of a decoder back that was killed."""
        with self._lock, contextlib.suppress(OSError):
            self._commands.sendall(f"end {process}".encode().ljust(COMMAND_BYTES))

    def end(self) -> None:
        """Ends it, and its decoders with it; the next decoder starts another."""
        with self._lock:
            process, self._process = self._process, None
            if process is not None:
                self._commands.close()
                process.kill()
                process.wait()

    def _start(self) -> None:
        self._commands, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "runtime.server.decoder_process"],
                stdin=theirs.fileno(),
                # Ctrl-C in the terminal is for the server alone
                start_new_session=True,
                # no threads: what is forked has one
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"},
            )


_SOURCE = _Source()
