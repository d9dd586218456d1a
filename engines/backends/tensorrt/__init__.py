"""Runs plans of TensorRT for RTX and TensorRT on an NVIDIA card. Both have the same API."""

from engines.registry import Backend

BACKENDS = tuple(
    Backend(
        name=name,
        title=title,
        runs=name,
        package=name,
        extra="tensorrt",
        devices=("cuda",),
        rank=2,
        module="engines.backends.tensorrt.engine",
    )
    for name, title in (("tensorrt_rtx", "TensorRT for RTX"), ("tensorrt", "TensorRT"))
)
