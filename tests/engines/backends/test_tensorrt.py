"""What TensorRT bundles refuse, in which words: all that can be found out without a card."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines.backends.tensorrt import engine as tensorrt
from engines.backends.tensorrt.library import (
    VARIANTS,
    Library,
    check_card,
    check_plans,
    header_refusal,
    load_library,
    loading_refusal,
)
from engines.backends.tensorrt.plans import PlanTensor, check_signature, open_plan
from engines.bundle import Bundle, file_record
from engines.cuda import Card, OutOfDeviceMemoryError, cuda_error, load_cuda_python
from engines.engine import open_engine
from engines.errors import AnyDoorError, BackendError, BundleError
from engines.manifest import MANIFEST, read_manifest
from engines.memory_plan import plan_device_memory
from engines.options import EngineOptions
from engines.spec import TensorSpec
from tests.support.anydoor import DECODE, DENOISE
from tests.support.cards import no_card, put_in_a_card
from tests.support.format_1 import OLD_BUNDLE
from tests.support.simulated_card import SimulatedDevice

RTX = "tensorrt_rtx"


without_card = pytest.mark.skipif(not no_card(), reason="there is a card")


@pytest.fixture(scope="module")
def library() -> Library:
    pytest.importorskip(RTX, reason="needs pip install '.[tensorrt]'")
    return load_library(RTX)


@pytest.fixture
def plans(tiny_plan_bundle: Path, tmp_path: Path) -> Bundle:
    """A copy whose files may be replaced."""
    path = tmp_path / "plans"
    shutil.copytree(tiny_plan_bundle, path)
    return Bundle.open(path)


def replace_file(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def with_plan(bundle: Bundle, graph: str, content: bytes) -> Bundle:
    """The bundle with another plan, and a manifest that knows it."""
    record = bundle.manifest.graphs[graph]
    replace_file(bundle.graph_file(graph), content)
    record = replace(record, files=(file_record(bundle.path, record.files[0].path),))
    return Bundle(bundle.path, replace(bundle.manifest, graphs={**bundle.manifest.graphs, graph: record}))


def with_manifest(bundle: Bundle, **changes: Any) -> Bundle:
    """The bundle with other entries in its manifest."""
    return Bundle(bundle.path, replace(bundle.manifest, **changes))


# --- plans ------------------------------------------------------------------------------------------------


def test_sound_plans_pass(plans: Bundle, library: Library) -> None:
    assert check_plans(plans) is library
    for graph in plans.manifest.graphs:
        plans.verify(graph)


def test_a_corrupted_plan_is_refused(plans: Bundle) -> None:
    path = plans.graph_file(DENOISE)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    replace_file(path, content)
    with pytest.raises(
        BundleError, match=r"denoise\.plan is not the file that was built \(its hash differs\)"
    ):
        Bundle.open(plans.path).verify(DENOISE)


def test_a_truncated_plan_is_refused(plans: Bundle) -> None:
    path = plans.graph_file(DECODE)
    size = path.stat().st_size
    replace_file(path, path.read_bytes()[: size // 2])
    with pytest.raises(BundleError, match=f"decode.plan has {size // 2} bytes instead of {size}"):
        Bundle.open(plans.path)


@pytest.mark.parametrize(
    "content",
    [b"", b"vgrt", bytes(64), b"this is not a plan of any version of anything" * 3],
    ids=["empty", "cut off", "zeros", "text"],
)
def test_a_foreign_file_is_refused_by_its_header(plans: Bundle, library: Library, content: bytes) -> None:
    foreign = with_plan(plans, DENOISE, content)
    with pytest.raises(
        BundleError, match=r"denoise\.plan' cannot be used: it is damaged, or is not a plan of"
    ):
        check_plans(foreign)


def test_an_onnx_graph_is_not_a_plan(plans: Bundle, tiny_bundle: Path, library: Library) -> None:
    onnx_graph = (tiny_bundle / "denoise.onnx").read_bytes()
    with pytest.raises(BundleError, match=r"not a plan of TensorRT for RTX.*--backend tensorrt_rtx"):
        check_plans(with_plan(plans, DENOISE, onnx_graph))


def test_another_version_is_refused(plans: Bundle, library: Library) -> None:
    other = with_manifest(plans, backend_version="1.2.0.54")
    sentence = (
        rf"built with TensorRT for RTX 1\.2\.0\.54 and {library.version} is installed: .*"
        r"pip install tensorrt_rtx==1\.2\.0\.54.*--targets sm86,sm89,sm120"
    )
    with pytest.raises(BundleError, match=sentence):
        open_engine(other)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("MALFORMED_ENGINE", "is damaged, or is not a plan"),
        (
            "VERSION_MISMATCH",
            "another version of TensorRT for RTX built it: rebuild it with 'anydoor build CHECK",
        ),
        ("UNSUPPORTED_CC", "it is for sm86,sm89,sm120 and this card is sm75: .* --targets sm75'"),
        ("OLD_CUDA_DRIVER", "driver is too old for it: .*ubuntu-drivers install"),
        ("OLD_CUDA_RUNTIME", "pip install -U cuda-python tensorrt_rtx"),
        ("INSUFFICIENT_GPU_MEMORY", "too little memory for it: .*--max-batch 1"),
        ("CUDA_ERROR", "'anydoor doctor'"),
    ],
)
def test_every_diagnosis_of_the_library_has_its_sentence(
    plans: Bundle, library: Library, monkeypatch: pytest.MonkeyPatch, name: str, sentence: str
) -> None:
    """The library's own names: a new version that knows more of them fails here."""
    put_in_a_card(monkeypatch, "sm75")
    bits = library.module.EngineInvalidityDiagnostics
    with pytest.raises(BundleError, match=sentence):
        raise header_refusal(library, plans, DENOISE, int(getattr(bits, name)))


def test_several_diagnoses_are_all_told(plans: Bundle, library: Library) -> None:
    bits = library.module.EngineInvalidityDiagnostics
    both = int(bits.UNSUPPORTED_CC) | int(bits.OLD_CUDA_DRIVER)
    text = str(header_refusal(library, plans, DENOISE, both))
    assert "it is for sm86,sm89,sm120 and this card is" in text
    assert "driver is too old" in text
    assert "the library says 0x400" in str(header_refusal(library, plans, DENOISE, 1 << 10))


def test_plans_of_tensorrt_are_for_the_card_that_built_them(
    plans: Bundle, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT itself is not needed for that: only what the manifest says of its plans."""
    card = Card("NVIDIA L4", "sm89", 24 << 30, 24 << 30, "12.8")
    check_card(library, with_manifest(plans, target="sm75"), card)  # TensorRT for RTX decides by the header
    monkeypatch.setattr(library, "backend", "tensorrt")
    monkeypatch.setattr(library, "variant", VARIANTS["tensorrt"])
    check_card(library, with_manifest(plans, target="sm89"), card)
    with pytest.raises(BundleError, match="is for sm87 and this card, NVIDIA L4, is sm89: build plans on"):
        check_card(library, with_manifest(plans, target="sm87"), card)


@without_card
def test_opening_a_plan_without_a_driver_gives_the_librarys_reason(plans: Bundle, library: Library) -> None:
    with pytest.raises(BundleError, match=r"cannot open the plan .*CUDA driver version is insufficient"):
        open_plan(library, plans, DECODE)


def test_what_the_library_logs_when_memory_is_short(plans: Bundle, library: Library) -> None:
    library.messages[:] = [("ERROR", "[defaultAllocator] Error Code 1: Cuda Runtime (out of memory)")]
    refusal = loading_refusal(library, plans, DENOISE)
    library.clear_messages()
    assert isinstance(refusal, OutOfDeviceMemoryError)
    assert "'denoise': give a smaller --memory-budget" in str(refusal)


def test_plans_of_format_version_1_are_found_by_the_names_that_they_have(tmp_path: Path) -> None:
    """They were built with inputs that are called otherwise today: noise, guidance and strength."""
    content = json.loads((OLD_BUNDLE / MANIFEST).read_text())
    record = content["graphs"][DENOISE]
    for graph in content["graphs"].values():
        graph |= {"backend": RTX, "backend_version": "1.2", "target": "sm89", "scratch_bytes": 5_000_000}
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    manifest = read_manifest(tmp_path / MANIFEST)
    assert (manifest.backend, manifest.backend_version, manifest.target) == (RTX, "1.2", "sm89")
    assert plan_device_memory(manifest, 8 << 30).graphs[DENOISE].scratch == 5_000_000

    def in_plan(tensor: dict[str, Any], is_input: bool) -> PlanTensor:
        shape = tuple(-1 if isinstance(size, str) else size for size in tensor["shape"])
        return PlanTensor(TensorSpec(tensor["name"], tensor["dtype"], shape), is_input)

    plan = [in_plan(of, True) for of in record["inputs"]] + [in_plan(of, False) for of in record["outputs"]]
    assert {"noise", "guidance", "strength"} < {tensor.spec.name for tensor in plan}
    assert {"carry", "guidance_scale", "control_scale"} < {tensor.name for tensor in manifest.step.inputs}
    check_signature(plan, manifest.step, manifest.largest_sizes)
    nameless = tuple(replace(tensor, file_name="") for tensor in manifest.step.inputs)
    with pytest.raises(BundleError, match="has other inputs and outputs than those in the manifest"):
        check_signature(plan, replace(manifest.step, inputs=nameless), manifest.largest_sizes)


# --- the machine ------------------------------------------------------------------------------------------


@without_card
def test_without_a_driver_the_sentence_says_what_to_do(plans: Bundle, library: Library) -> None:
    with pytest.raises(BackendError, match="driver") as refusal:
        open_engine(plans)
    assert "anydoor build" in str(refusal.value) or "install" in str(refusal.value)


def test_plans_do_not_run_on_the_cpu(plans: Bundle) -> None:
    with pytest.raises(BackendError, match=r"build one for the CPU with .*--backend onnxruntime"):
        open_engine(plans, EngineOptions(device="cpu"))


@pytest.mark.parametrize(
    ("name", "driver", "sentence"),
    [
        ("cudaErrorInsufficientDriver", 0, "there is no NVIDIA driver: install one"),
        ("cudaErrorInsufficientDriver", 11040, r"too old: it supports CUDA 11\.4 .*ubuntu-drivers install"),
        ("cudaErrorNoDevice", 12080, "finds no NVIDIA card: .*--gpus all"),
        ("cudaErrorSystemDriverMismatch", 12080, "reboot"),
        ("cudaErrorNoKernelImageForDevice", 12080, "--backend tensorrt"),
        ("cudaErrorIllegalAddress", 12080, "failed with cudaErrorIllegalAddress while copying.*doctor"),
    ],
)
def test_cuda_errors_have_sentences(name: str, driver: int, sentence: str) -> None:
    cuda = pytest.importorskip("cuda.bindings.runtime", reason="needs pip install '.[tensorrt]'")
    assert hasattr(cuda.cudaError_t, name)
    with pytest.raises(BackendError, match=sentence):
        raise cuda_error(name, "copying", driver)


@pytest.mark.parametrize(("free", "left"), [(None, ""), (3_000_000, ", 3 MB are free")])
def test_a_full_card_is_told_apart(free: int | None, left: str) -> None:
    with pytest.raises(
        OutOfDeviceMemoryError, match=f"out of memory while allocating 5 MB{left}: .*--memory-budget"
    ):
        raise cuda_error("cudaErrorMemoryAllocation", "allocating 5 MB", 12080, free)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda.bindings.runtime", "cuda.cudart", "tensorrt", RTX):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendError, match=r"cuda-python is not installed; .*\[tensorrt\]"):
        load_cuda_python()
    for backend, variant in VARIANTS.items():
        with pytest.raises(BackendError, match=f"{variant.title} is not installed"):
            Library(backend)


def test_a_bundle_of_an_unknown_kind_is_refused(plans: Bundle) -> None:
    with pytest.raises(
        BundleError, match=r"is for openvino; this version .* onnxruntime, tensorrt_rtx, tensorrt$"
    ):
        open_engine(with_manifest(plans, backend="openvino"))


def test_usable_devices_are_those_of_the_installed_libraries(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "VARIANTS", {RTX: VARIANTS[RTX]})
    assert tensorrt.usable_devices() == {"cuda": f"{library.variant.title} {library.version}"}
    put_in_a_card(monkeypatch, "sm90")
    with pytest.raises(
        BackendError, match=r"TensorRT for RTX supports .* not this card, simulated, which is sm90"
    ):
        tensorrt.usable_devices()

    def missing(backend: str) -> Library:
        raise BackendError(f"{backend} is not installed")

    monkeypatch.setattr(tensorrt, "usable_library", missing)
    with pytest.raises(BackendError, match="tensorrt_rtx is not installed"):
        tensorrt.usable_devices()


# --- memory -----------------------------------------------------------------------------------------------


def test_memory_is_planned_from_the_manifest(plans: Bundle) -> None:
    plan = plan_device_memory(plans.manifest, 8 << 30)
    for name, record in plans.manifest.graphs.items():
        assert plan.graphs[name].weights == record.files[0].bytes
        assert plan.graphs[name].scratch == record.scratch_bytes[RTX]
    with pytest.raises(AnyDoorError, match=r"at least .* MB of device memory, but 1 MB may be used"):
        plan_device_memory(plans.manifest, 1 << 20)


@without_card
def test_examining_refuses_the_bundle_before_it_needs_a_card(plans: Bundle, library: Library) -> None:
    with pytest.raises(BackendError, match=r"at least .* MB of device memory, but 1 MB may be used"):
        tensorrt.examine(plans, EngineOptions(memory_budget=1 << 20))
    with pytest.raises(BackendError) as refusal:
        tensorrt.examine(plans, EngineOptions(memory_budget=8 << 30))
    assert str(refusal.value) == no_card()
    with pytest.raises(BundleError, match="not a plan of TensorRT for RTX"):
        tensorrt.examine(with_plan(plans, DENOISE, b"vgrt"), EngineOptions())


def test_examining_tells_the_card_and_what_would_live_where(
    plans: Bundle, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "Device", lambda: SimulatedDevice(memory=10_000_000_000))
    for options, budget in ((EngineOptions(), "9000.0"), (EngineOptions(memory_budget=8 * 10**9), "8000.0")):
        card, table = tensorrt.examine(plans, options)
        assert card == "simulated"
        assert f"of a budget of {budget} MB" in table


@pytest.mark.parametrize(("memory", "expected"), [(1 << 20, False), (8 << 30, True)])
def test_whether_a_bundle_fits_the_card(
    plans: Bundle, monkeypatch: pytest.MonkeyPatch, memory: int, expected: bool
) -> None:
    monkeypatch.setattr(tensorrt, "Device", lambda: SimulatedDevice(memory))
    assert tensorrt.fits(plans, EngineOptions()) == expected


@without_card
def test_without_a_card_nothing_fits(plans: Bundle) -> None:
    assert not tensorrt.fits(plans, EngineOptions())
