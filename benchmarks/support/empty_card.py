"""A card that computes nothing: ONNX Runtime's CUDA provider runs on it, on a machine without one.

What the provider allocates is real, what it computes is not. Its libraries are replaced by one that keeps
memory on the host, and whose other functions do nothing (empty_card.c).
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.cuda import Card
from engines.errors import AnyDoorError

_SOURCE = Path(__file__).with_name("empty_card.c")
_REPLACED = re.compile(r"(__)?(cuda|cublas|cu[A-Z])\w+")
_KEPT = re.compile(r"__cuda(Unr|R)egister\w+|cudaGetError(Name|String)")
"""Functions that need no card."""


def build(folder: Path) -> Mapping[str, str]:
    """Compile the libraries, and return the environment of a process that runs on them.

    Args:
        folder: where to.

    Raises:
        AnyDoorError: onnxruntime-gpu, a C compiler or `nm` is missing.
    """
    for program in ("cc", "nm"):
        if not shutil.which(program):
            raise AnyDoorError(f"'{program}' is missing: install a C compiler and binutils")
    package = find_spec("onnxruntime")
    provider = (
        Path(package.origin or "").parent / "capi" / "libonnxruntime_providers_cuda.so" if package else None
    )
    if provider is None or not provider.exists():
        raise AnyDoorError("the provider's library is missing: pip install 'onnxruntime-gpu[cuda,cudnn]'")
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", provider], capture_output=True, text=True, check=True
    ).stdout
    called = {line.split()[-1].partition("@")[0] for line in listed.splitlines()}
    names = {name for name in called if _REPLACED.fullmatch(name) and not _KEPT.match(name)}
    # it looks for cuDNN's functions by name
    names |= {name.decode() for name in re.findall(rb"\0(cudnn[A-Z]\w+)(?=\0)", provider.read_bytes())}
    source = _SOURCE.read_text("utf-8")
    rest = folder / "rest.c"
    missing = sorted(name for name in names if not re.search(rf"\b{name}\(", source))
    rest.write_text("".join(f"int {name}() {{ return 0; }}\n" for name in missing), "utf-8")
    library = folder / "libcudnn.so.9"
    flags = ["-shared", "-fPIC", "-w", f"-Wl,-soname,{library.name}"]
    subprocess.run(["cc", *flags, "-o", library, _SOURCE, rest], check=True)
    (folder / "libcuda.so.1").symlink_to(library)
    return {**os.environ, "LD_PRELOAD": os.fspath(library), "LD_LIBRARY_PATH": os.fspath(folder)}


class HostDevice:
    """See `engines.cuda.Device`; everything happens at once."""

    allocated = 0
    """Bytes of all devices of the process, without pinned ones."""

    def __init__(self, stream: int | None = None) -> None:
        """Makes a stream, if there is none."""
        self._blocks: dict[int, NDArray[np.uint8]] = {}
        self._pinned: list[NDArray[np.uint8]] = []
        self.stream = stream or 1

    def card(self) -> Card:
        """Returns a large card."""
        return Card("empty", "sm90", 141_000_000_000, 141_000_000_000, "13.0")

    def allocate(self, nbytes: int) -> int:
        """Returns the address of new memory."""
        # numpy maps large arrays, so their pages are taken when they are written to
        block = np.empty(nbytes, np.uint8)
        self._blocks[block.ctypes.data] = block
        HostDevice.allocated += nbytes
        return block.ctypes.data

    def allocate_pinned(self, nbytes: int) -> tuple[int, NDArray[np.uint8]]:
        """Returns the address of new memory, and the same as an array."""
        self._pinned.append(np.empty(nbytes, np.uint8))
        return self._pinned[-1].ctypes.data, self._pinned[-1]

    def free(self, address: int) -> None:
        """Frees what `allocate` returned."""
        HostDevice.allocated -= self._blocks.pop(address).nbytes

    def free_all(self) -> None:
        """Frees everything."""
        for address in list(self._blocks):
            self.free(address)

    def copy(self, destination: int, source: int, nbytes: int) -> None:
        """Copies."""
        ctypes.memmove(destination, source, nbytes)

    def synchronize(self) -> None:
        """Does nothing."""

    def new_event(self) -> Any:
        """Returns something."""
        return object()

    def record(self, event: Any) -> None:
        """Does nothing."""

    def reached(self, event: Any) -> bool:
        """Returns that all is done."""
        return True

    def capture(self, work: Callable[[], None]) -> Any:
        """Does the work."""
        work()
        return object()

    def launch(self, captured: Any) -> None:
        """Does nothing."""

    def free_captured(self, captured: Any) -> None:
        """Does nothing."""
