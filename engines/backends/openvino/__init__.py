"""Runs ONNX graphs with OpenVINO on the CPU."""

from engines.registry import Backend

BACKENDS = (
    Backend(
        name="openvino",
        title="OpenVINO",
        runs="onnxruntime",
        package="openvino",
        install="pip install '.[openvino]'",
        devices=("cpu",),
        precisions=("fp32", "bf16"),
        module="engines.backends.openvino.engine",
    ),
)
