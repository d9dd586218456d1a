"""Runs ONNX graphs with ONNX Runtime, on the CPU or an NVIDIA card."""

from engines.registry import Backend

BACKENDS = (
    Backend(
        name="onnxruntime",
        title="ONNX Runtime",
        runs="onnxruntime",
        package="onnxruntime",
        install="pip install '.[cpu]' (or '.[cuda]' for an NVIDIA card)",
        devices=("cpu", "cuda"),
        precisions=("fp32", "tf32"),
        rank=1,
        card_files="capi/*onnxruntime_providers_cuda.*",
        module="engines.backends.onnxruntime.engine",
    ),
)
