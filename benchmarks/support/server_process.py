"""A server in a process of its own, and requests for it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image

from engines.errors import AnyDoorError
from runtime.rpc import compositor_pb2 as pb

CHANNEL_OPTIONS = (("grpc.enable_retries", 0), ("grpc.max_receive_message_length", -1))
"""Of a client that counts what a server loses, and takes answers of any size."""

_SIDE = 160
_OBJECT_SIDE = 64


class ServerProcess:
    """`anydoor serve` at a free port; a context manager that is ready when entered."""

    def __init__(self, bundle: Path, *flags: str, log: Path | None = None) -> None:
        """Start the process.

        Args:
            bundle: what it serves.
            flags: further flags.
            log: where its log lines go; they are dropped if None.
        """
        command = [sys.executable, "-m", "runtime", "serve", f"--bundle={bundle}", "--listen=127.0.0.1:0"]
        # whoever reads what this process prints would wait for the server, should this process be killed
        self.process = subprocess.Popen(
            [*command, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self._log = log
        self.address = ""
        self.http = ""
        """Where HTTP is, if a flag asks for it."""

    def __enter__(self) -> ServerProcess:
        assert self.process.stderr is not None
        lines = []
        for line in self.process.stderr:
            lines.append(line)
            event = json.loads(line) if line.startswith("{") else {}
            if event.get("event") == "listening":
                self.address, self.http = event["addresses"][0], event.get("http", "")
            if event.get("event") == "serving":
                break
        else:
            raise AnyDoorError(f"the server did not start: {''.join(lines)}")
        # a full pipe would block the server
        sink = self._log.open("w") if self._log else subprocess.DEVNULL
        self._reader = subprocess.Popen(["cat"], stdin=self.process.stderr, stdout=sink)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.process.terminate()
        self.process.wait()
        self._reader.wait()


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a server and of the processes that it started; 0 if it has ended."""
    import psutil

    def of_one(process: psutil.Process) -> int:
        try:
            return int(process.memory_info().rss)
        except psutil.Error:
            return 0

    try:
        server = psutil.Process(pid)
        return sum(of_one(process) for process in (server, *server.children(recursive=True)))
    except psutil.Error:
        return 0


def picture(seed: int) -> bytes:
    """Draw a PNG of smooth noise."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return _png(Image.fromarray(small).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))


def cutout(seed: int) -> bytes:
    """Draw a PNG of an opaque ellipse on a transparent background."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    rgb = Image.fromarray(small).resize((_OBJECT_SIDE, _OBJECT_SIDE), Image.Resampling.BICUBIC)
    y, x = np.mgrid[-1 : 1 : _OBJECT_SIDE * 1j, -1 : 1 : _OBJECT_SIDE * 1j]  # type: ignore[misc]
    rgb.putalpha(Image.fromarray(np.uint8(255) * (x**2 + (1.4 * y) ** 2 < 0.9)))
    return _png(rgb)


def request(seed: int, steps: int, **fields: object) -> pb.CompositeRequest:
    """Make a request that shares nothing with those of other seeds, so that no cache helps."""
    source = np.random.default_rng(seed)
    x, y, width, height = (int(value) for value in source.integers((0, 0, 40, 40), (80, 80, 80, 80)))
    return pb.CompositeRequest(
        scene=picture(seed),
        placements=[
            pb.Placement(reference=cutout(seed), box=pb.Box(x0=x, y0=y, x1=x + width, y1=y + height))
        ],
        sampling=pb.Sampling(steps=steps),
        seed=seed,
        **fields,  # type: ignore[arg-type]
    )


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
