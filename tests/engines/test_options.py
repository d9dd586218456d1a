"""EngineOptions: what no engine has is refused when they are made, and every field can be a flag."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from engines.errors import BackendError
from engines.options import EngineOptions
from engines.registry import backends


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (
            {"backend": "abacus"},
            "there is no backend 'abacus': choose one of auto, openvino, onnxruntime, tensorrt_rtx, tensorrt",
        ),
        ({"device": "abacus"}, "there is no device 'abacus': choose one of auto, cpu, cuda"),
        (
            {"inference_precision": "fp4"},
            "there is no inference precision 'fp4': choose one of fp32, tf32, bf16",
        ),
        ({"threads": 0}, "threads must be at least 1, not 0"),
        ({"threads": -2}, "threads must be at least 1, not -2"),
        ({"memory_budget": 0}, "memory_budget must be at least 1, not 0"),
    ],
)
def test_options_that_no_engine_has(option: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BackendError) as caught:
        EngineOptions(**option)
    assert str(caught.value) == sentence


def test_every_backend_device_and_precision_can_be_chosen() -> None:
    for backend in backends().values():
        for device in backend.devices:
            for precision in backend.precisions:
                options = EngineOptions(backend.name, device, precision, threads=1, memory_budget=1)
                assert (options.backend, options.device) == (backend.name, device)


def test_nothing_need_be_chosen() -> None:
    options = EngineOptions()
    assert (options.backend, options.device, options.inference_precision) == ("auto", "auto", "fp32")
    assert (options.threads, options.memory_budget, options.cuda_graphs) == (None, None, True)
    assert options == EngineOptions()
    assert hash(options) == hash(EngineOptions())
    with pytest.raises(FrozenInstanceError):
        options.threads = 3  # type: ignore[misc]


def test_every_field_says_how_it_is_a_flag() -> None:
    for field in fields(EngineOptions):
        assert field.metadata["help"]
        if "choices" in field.metadata:
            assert field.default in field.metadata["choices"]
        elif field.default is None:
            assert field.metadata["metavar"] in ("N", "SIZE")
            assert field.metadata.get("is_size", False) == (field.metadata["metavar"] == "SIZE")
        else:
            assert isinstance(field.default, bool)
