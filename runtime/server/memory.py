"""Accounts for the memory of all requests, from the first byte received to the last byte sent."""

from __future__ import annotations

import ctypes
import gc
import math
import threading
from collections import Counter

from engines.host_memory import trim
from runtime.imaging.mending import MAX_PROFILE_BYTES
from runtime.imaging.picture import MAX_EXIF_BYTES
from runtime.server.decoding import decoder_bytes
from runtime.server.events import MemoryFullError

PLAIN_SCENE = 3
"""Bytes for each pixel of a scene in sRGB."""
LARGEST_SCENE = 10
"""The same of one that is transparent, in colours of its own: those, sRGB, opacity, and what the networks
see."""
LARGEST_METADATA = MAX_PROFILE_BYTES + MAX_EXIF_BYTES
PROBE_BYTES = 8
"""Messages of callers that need no token (health), received at a time; see `runtime.server.health`."""
_ARENA_MAX = -8
"""M_ARENA_MAX in malloc.h of glibc."""
_PREPARED_BYTES_PER_PIXEL = 24
"""Bytes per drawn pixel: the collage in float32, its mask, and the picture."""
_SCRATCH_BYTES_PER_PIXEL = 24
"""A worker thread's, when it prepares, pastes and encodes."""


class Ledger:
    """Accounts for the memory of all clients, under a limit; each gets at most half of what the others
    leave."""

    def __init__(self, capacity: float = math.inf) -> None:
        """Starts empty.

        Args:
            capacity: bytes in all.
        """
        self.capacity = capacity
        self.taken = 0
        self.most = 0
        """The most that was ever taken."""
        self._of_client: Counter[str] = Counter()
        self._accounts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def open(self, client: str) -> Account:
        """Returns an account of a client's call, with nothing in it."""
        with self._lock:
            self._accounts[client] += 1
        return Account(self, client)

    def change(self, client: str, nbytes: int) -> None:
        """Takes bytes, or gives them back. An account calls it.

        Raises:
            MemoryFullError: there is no room, or none for this client.
        """
        with self._lock:
            if nbytes > 0:
                own = self._of_client[client]
                free = self.capacity - self.taken
                # who has a single call may use all that is free: else the largest request never could
                share = free if self._accounts[client] == 1 else (free + own) / 2 - own
                if nbytes > min(share, free):
                    raise MemoryFullError()
            self.taken += nbytes
            self.most = max(self.most, self.taken)
            self._of_client[client] += nbytes

    def close(self, client: str) -> None:
        """Ends an account of a client. The account calls it."""
        with self._lock:
            self._accounts[client] -= 1
            if not self._accounts[client]:
                del self._accounts[client], self._of_client[client]


class Account:
    """The memory of one call."""

    def __init__(self, ledger: Ledger, client: str) -> None:
        self._ledger = ledger
        self._client = client
        self._lock = threading.Lock()
        self._closed = False
        self.nbytes = 0
        """Bytes that it takes now."""

    def add(self, nbytes: int) -> None:
        """Takes more, or gives back where negative.

        Raises:
            MemoryFullError: there is no room; nothing is changed.
        """
        with self._lock:
            if not self._closed:
                self._ledger.change(self._client, nbytes)
                self.nbytes += nbytes

    def set(self, nbytes: int) -> None:
        """Takes so many in all; see `add`."""
        with self._lock:
            if not self._closed:
                self._ledger.change(self._client, nbytes - self.nbytes)
                self.nbytes = nbytes

    def close(self) -> None:
        """Gives all back, for good."""
        with self._lock:
            if not self._closed:
                self._ledger.change(self._client, -self.nbytes)
                self._ledger.close(self._client)
                self._closed, self.nbytes = True, 0


def share_one_arena() -> None:
    """Lets all threads that begin from now on allocate from one place.

    glibc gives each thread an arena of its own, up to eight for each core, and keeps what is freed in them.
    Each model that is loaded brings threads, so a server whose models take turns grew at every load
    (`docs/studies/server-load.md`). See mallopt(3), M_ARENA_MAX.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_ARENA_MAX, 1)


def give_back() -> None:
    """Gives the memory of what is no longer used back to the system."""
    gc.collect()
    trim()


def request_bytes(
    pixels: int,
    masks: int,
    placements: int,
    drawn: int,
    images: int,
    scene: int = PLAIN_SCENE,
    channels: int = 3,
    metadata: int = 0,
) -> int:
    """Returns the most that a prepared request takes until its answer is sent. Its message is no longer kept.

    Args:
        pixels: of the scene.
        masks: of the scene's size.
        placements: objects, prepared for the networks.
        drawn: pixels that the networks draw of each.
        images: that are asked for. Each is a canvas, then a file; at the end all files are there twice: in
            the answer, and in the transport.
        scene: bytes for each of its pixels.
        channels: of the files: 4 with transparency.
        metadata: bytes of colour profile and EXIF, which each file has.
    """
    kept = (scene + masks) * pixels + placements * _PREPARED_BYTES_PER_PIXEL * drawn
    return kept + 2 * images * (channels * pixels + metadata)


def bound(capacity: int, workers: int, max_pixels: int, max_message_bytes: int) -> int:
    """Returns the most that callers can make a server take, beside the model and what it keeps:
    docs/serving.md."""
    of_worker = decoder_bytes(max_pixels, max_message_bytes) + _SCRATCH_BYTES_PER_PIXEL * max_pixels
    return capacity + workers * of_worker + PROBE_BYTES * max_message_bytes
