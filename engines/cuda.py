"""Drives an NVIDIA card through cuda-python: memory, one stream, copies, captured graphs. Does not use torch.

cuda-python has renamed its modules: `cuda.cudart` until 12.6, `cuda.bindings.runtime` since. Both work.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import BackendError
from engines.manifest import BUILD_COMMAND

INSTALL = "install it with: pip install '.[cuda]' or '.[tensorrt]'"
_MODULES = ("cuda.bindings.runtime", "cuda.cudart")

_EXPLANATIONS = {
    "cudaErrorInsufficientDriver": "there is no NVIDIA driver: install one (on Ubuntu: sudo ubuntu-drivers "
    f"install) and reboot, or build a bundle for the CPU with '{BUILD_COMMAND} --backend onnxruntime'",
    "cudaErrorNoDevice": "the driver finds no NVIDIA card: check 'nvidia-smi' and CUDA_VISIBLE_DEVICES (in a "
    "container, start it with --gpus all)",
    "cudaErrorSystemDriverMismatch": "the NVIDIA driver was updated and the old one is still loaded: reboot",
    "cudaErrorSystemNotReady": "the NVIDIA driver is not ready: check 'nvidia-smi' and the fabric manager",
    "cudaErrorDevicesUnavailable": "another program has the card to itself: end it, see 'nvidia-smi'",
    "cudaErrorUnsupportedPtxVersion": "the NVIDIA driver is too old for these kernels: install a current one",
    "cudaErrorNoKernelImageForDevice": "the plan holds no code for this card: rebuild the bundle with "
    "'anydoor build ONNX_BUNDLE --backend tensorrt' on this machine",
}
"""Name of a CUDA error -> what it means here, and what to do."""


class OutOfDeviceMemoryError(BackendError):
    """The card's memory is full."""


def cuda_error(name: str, doing: str, driver: int = 0, free: int | None = None) -> BackendError:
    """Returns the error for a CUDA status.

    Args:
        name: as CUDA names it, like cudaErrorNoDevice.
        doing: what was tried, to complete "while ...".
        driver: CUDA version that the driver supports, like 12080 for 12.8; 0 if there is no driver.
        free: bytes of the card's memory that are free, if known.
    """
    if name == "cudaErrorInsufficientDriver" and driver:
        return BackendError(
            f"the NVIDIA driver is too old: it supports CUDA {_version(driver)} and the installed libraries "
            "need more: install a current driver (on Ubuntu: sudo ubuntu-drivers install) and reboot"
        )
    if name == "cudaErrorMemoryAllocation":
        left = "" if free is None else f", {free / 1e6:.0f} MB are free"
        return OutOfDeviceMemoryError(
            f"the card is out of memory while {doing}{left}: close other programs that use it (see "
            "'nvidia-smi'), or give a smaller --memory-budget"
        )
    explanation = _EXPLANATIONS.get(name)
    if explanation:
        return BackendError(explanation)
    return BackendError(f"CUDA failed with {name} while {doing}: check the card with 'anydoor doctor'")


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def load_cuda_python() -> Any:
    """Returns the CUDA runtime API of cuda-python, by its new name or the old one.

    Raises:
        BackendError: it is not installed.
    """
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise BackendError(f"cuda-python is not installed; {INSTALL}")


@dataclass(frozen=True)
class Card:
    """The driver's description of a card."""

    name: str
    architecture: str
    """sm89 and the like."""
    total: int
    """Bytes of memory; on a Jetson it is the system's memory."""
    free: int
    driver: str
    """CUDA version that the driver supports, like 12.8."""


class Device:
    """The first card, one stream on it, and memory. Everything happens in the order in which it is called."""

    def __init__(self, stream: int | None = None) -> None:
        """Starts the driver.

        Args:
            stream: handle of the stream to use; None for a new one.

        Raises:
            BackendError: there is no card, or the driver does not work; says what to do.
        """
        self._cuda = load_cuda_python()
        self._call("looking for a card", self._cuda.cudaGetDeviceCount)
        self._call("starting the card", self._cuda.cudaSetDevice, 0)
        if stream is None:
            flags = self._cuda.cudaStreamNonBlocking
            stream = int(self._call("creating a stream", self._cuda.cudaStreamCreateWithFlags, flags))
        self.stream = stream
        """Handle of the stream."""
        self._allocated: list[tuple[Callable[..., Any], int]] = []
        """What frees memory, and its address."""

    def card(self) -> Card:
        """Returns the driver's description of the card."""
        properties = self._call("reading properties", self._cuda.cudaGetDeviceProperties, 0)
        free, total = self._call("reading memory", self._cuda.cudaMemGetInfo)
        driver = self._call("reading the driver's version", self._cuda.cudaDriverGetVersion)
        return Card(
            name=properties.name.decode().rstrip("\0"),
            architecture=f"sm{properties.major}{properties.minor}",
            total=int(total),
            free=int(free),
            driver=_version(driver),
        )

    def allocate(self, nbytes: int) -> int:
        """Returns address of new device memory.

        Raises:
            OutOfDeviceMemoryError: there is not so much.
        """
        doing = f"allocating {nbytes / 1e6:.0f} MB"
        address = int(self._call(doing, self._cuda.cudaMalloc, nbytes))
        self._allocated.append((self._cuda.cudaFree, address))
        return address

    def allocate_pinned(self, nbytes: int) -> tuple[int, NDArray[np.uint8]]:
        """Host memory that the card copies from and to by itself: its address, and as an array."""
        address = int(self._call("pinning host memory", self._cuda.cudaMallocHost, nbytes))
        self._allocated.append((self._cuda.cudaFreeHost, address))
        return address, np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))

    def free(self, address: int) -> None:
        """Frees what `allocate` returned."""
        self._allocated.remove((self._cuda.cudaFree, address))
        self._call("freeing memory", self._cuda.cudaFree, address)

    def free_all(self) -> None:
        """Frees all memory that was allocated here."""
        while self._allocated:
            free, address = self._allocated.pop()
            self._call("freeing memory", free, address)

    def copy(self, destination: int, source: int, nbytes: int) -> None:
        """Copies between any two places, in the order of the stream."""
        # the driver knows from the addresses which side is which
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDefault
        doing = f"copying {nbytes} bytes"
        self._call(doing, self._cuda.cudaMemcpyAsync, destination, source, nbytes, kind, self.stream)

    def synchronize(self) -> None:
        """Waits until everything is done.

        Raises:
            BackendError: something in the stream failed.
        """
        self._call("running a graph", self._cuda.cudaStreamSynchronize, self.stream)

    def new_event(self) -> Any:
        """Returns a place in the stream that can be asked for, once it is recorded."""
        flags = self._cuda.cudaEventDisableTiming
        return self._call("creating an event", self._cuda.cudaEventCreateWithFlags, flags)

    def record(self, event: Any) -> None:
        """Puts an event behind everything that is in the stream."""
        self._call("recording an event", self._cuda.cudaEventRecord, event, self.stream)

    def reached(self, event: Any) -> bool:
        """Returns whether everything before an event is done; does not wait. Not while another thread
        captures.

        Raises:
            BackendError: something before it failed.
        """
        if self._cuda.cudaEventQuery(event)[0] == self._cuda.cudaError_t.cudaErrorNotReady:
            return False
        self._call("running a graph", self._cuda.cudaEventQuery, event)
        return True

    def capture(self, work: Callable[[], None]) -> Any:
        """Records what `work` puts into the stream, without running it; `launch` runs it."""
        cuda = self._cuda
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("capturing", cuda.cudaStreamBeginCapture, self.stream, mode)
        try:
            work()
        except BaseException:
            # leave the stream usable; the capture itself is broken, and says so again
            _, graph = cuda.cudaStreamEndCapture(self.stream)
            if graph:
                cuda.cudaGraphDestroy(graph)
            raise
        graph = self._call("capturing", cuda.cudaStreamEndCapture, self.stream)
        try:
            return self._call("instantiating a captured graph", cuda.cudaGraphInstantiate, graph, 0)
        finally:
            cuda.cudaGraphDestroy(graph)

    def launch(self, captured: Any) -> None:
        """Runs what `capture` recorded."""
        self._call("running a captured graph", self._cuda.cudaGraphLaunch, captured, self.stream)

    def free_captured(self, captured: Any) -> None:
        """Frees what `capture` recorded."""
        self._call("freeing a captured graph", self._cuda.cudaGraphExecDestroy, captured)

    def _call(self, doing: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Returns the results of a CUDA function, of which the first is its status."""
        status, *results = function(*arguments)
        if status != self._cuda.cudaError_t.cudaSuccess:
            _, driver = self._cuda.cudaDriverGetVersion()
            _, free, _ = self._cuda.cudaMemGetInfo()
            raise cuda_error(status.name, doing, driver or 0, free)
        return results[0] if len(results) == 1 else tuple(results)
