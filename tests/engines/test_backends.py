"""Which backend executes a bundle: the fastest that is installed, or the one that is asked for."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from engines import registry
from engines.bundle import Bundle
from engines.engine import choose_backend, open_engine
from engines.errors import BackendError
from engines.options import EngineOptions

CPU, CARD = EngineOptions(device="cpu"), EngineOptions(device="cuda")


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> set[str]:
    """The names of packages that are found; to be filled by the test."""
    names: set[str] = set()

    def find_spec(name: str) -> ModuleSpec | None:
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(tmp_path / name)]
        return spec if name in names else None

    monkeypatch.setattr(registry, "find_spec", find_spec)
    return names


def test_openvino_comes_before_onnxruntime_on_a_cpu(bundle: Bundle, installed: set[str]) -> None:
    installed |= {"onnxruntime"}
    assert choose_backend(bundle) == "onnxruntime"
    installed |= {"openvino"}
    assert choose_backend(bundle) == choose_backend(bundle, CPU) == "openvino"


def test_a_card_comes_before_the_cpu(bundle: Bundle, installed: set[str], tmp_path: Path) -> None:
    installed |= {"onnxruntime", "openvino"}
    provider = tmp_path / "onnxruntime" / "capi" / "libonnxruntime_providers_cuda.so"
    provider.parent.mkdir(parents=True)
    provider.touch()
    assert choose_backend(bundle) == choose_backend(bundle, CARD) == "onnxruntime"
    assert choose_backend(bundle, CPU) == "openvino"
    assert choose_backend(bundle, EngineOptions(inference_precision="bf16")) == "openvino"


def test_without_any_backend_the_one_to_install_is_named(bundle: Bundle, installed: set[str]) -> None:
    assert choose_backend(bundle) == "onnxruntime"


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_backend_that_is_asked_for_is_taken(bundle: Bundle, backend: str) -> None:
    pytest.importorskip(backend)
    assert open_engine(bundle, EngineOptions(backend, "cpu")).backend == backend


def test_plans_are_not_made_of_onnx_graphs_at_run_time(bundle: Bundle) -> None:
    with pytest.raises(
        BackendError, match=r"runs with the backend openvino or onnxruntime, not with tensorrt"
    ):
        open_engine(bundle, EngineOptions(backend="tensorrt"))


def test_onnxruntime_has_no_bfloat16(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match="only the backend openvino has the inference precision bf16"):
        open_engine(bundle, EngineOptions("onnxruntime", "cpu", inference_precision="bf16"))
