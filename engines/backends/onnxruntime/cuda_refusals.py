"""Says in one sentence why ONNX Runtime's CUDA provider does not start, load a graph or run one."""

from __future__ import annotations

from engines.cuda import OutOfDeviceMemoryError
from engines.errors import BackendError, BundleError

INSTALL = "install it with: pip install '.[cuda]'"

NOT_STARTED = (
    "ONNX Runtime could not start its cuda provider: the NVIDIA driver or the CUDA and cuDNN libraries are "
    f"missing; {INSTALL}, check with 'anydoor doctor', or run with --device cpu"
)


def scratch_refusal(error: OutOfDeviceMemoryError) -> OutOfDeviceMemoryError:
    """Returns the error for scratch memory that was not allocated."""
    return OutOfDeviceMemoryError(
        f"the card has no room for scratch memory ({reason(error)}): close other programs that use it (see "
        "'nvidia-smi')"
    )


def loading_refusal(graph: str, capture: bool, error: Exception) -> BackendError | BundleError:
    """Returns the error for a graph that was not loaded.

    Args:
        graph: which one.
        capture: whether its calls were to be captured.
        error: what the library raised.
    """
    if _is_about_memory(error):
        return OutOfDeviceMemoryError(
            f"the card has no room for the graph '{graph}' ({reason(error)}): close other programs that use "
            "it (see 'nvidia-smi'), or give a larger --memory-budget"
        )
    if capture and "graph capture feature" in str(error):
        return BundleError(
            f"the graph '{graph}' has operators that the card cannot run, and so cannot be captured: run "
            "with --no-cuda-graphs"
        )
    return BundleError(f"ONNX Runtime cannot load the graph '{graph}': {reason(error)}")


def running_refusal(graph: str, error: Exception) -> BackendError:
    """Returns the error for a graph that did not run."""
    if _is_about_memory(error):
        return OutOfDeviceMemoryError(
            f"the card has no room to run the graph '{graph}' ({reason(error)}): ask for fewer pictures at "
            "once, or give a larger --memory-budget"
        )
    return BackendError(f"ONNX Runtime could not run the graph '{graph}': {reason(error)}")


def _is_about_memory(error: Exception) -> bool:
    # ours; or the library's, of an arena (as for pinned memory) or cudaMalloc
    return isinstance(error, OutOfDeviceMemoryError) or any(
        words in str(error) for words in ("smaller than requested", "Failed to allocate", "out of memory")
    )


def reason(error: Exception) -> str:
    """Returns the first line of what the library says, at most 300 characters."""
    return str(error).splitlines()[0][:300]
