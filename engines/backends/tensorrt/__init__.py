"""Runs plans of TensorRT for RTX and TensorRT on an NVIDIA card. Both have the same API."""

from engines.registry import Backend

BACKENDS = tuple(
    Backend(
        name=name,
        title=title,
        runs=name,
        package=name,
        install=install,
        devices=("cuda",),
        rank=2,
        module="engines.backends.tensorrt.engine",
    )
    for name, title, install in (
        ("tensorrt_rtx", "TensorRT for RTX", "pip install '.[tensorrt]'"),
        (
            "tensorrt",
            "TensorRT",
            "pip install tensorrt cuda-python (on a Jetson: sudo apt install python3-libnvinfer)",
        ),
    )
)
