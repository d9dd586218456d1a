"""Which cards TensorRT and TensorRT for RTX are used on, and what is said of others. No card is needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines.backends.tensorrt import engine as tensorrt
from engines.backends.tensorrt.library import (
    VARIANTS,
    Library,
    check_card,
    check_support,
    header_refusal,
    load_library,
)
from engines.bundle import Bundle
from engines.engine import open_engine
from engines.errors import BackendError
from engines.options import EngineOptions
from tests.support.anydoor import DENOISE
from tests.support.cards import put_in_a_card
from tests.support.simulated_card import SimulatedDevice

RTX = "tensorrt_rtx"


@pytest.fixture(scope="module")
def library() -> Library:
    pytest.importorskip(RTX, reason="needs pip install '.[tensorrt]'")
    return load_library(RTX)


@pytest.fixture
def plans(tiny_plan_bundle: Path) -> Bundle:
    return Bundle.open(tiny_plan_bundle)


def with_manifest(bundle: Bundle, **changes: Any) -> Bundle:
    """The bundle with other entries in its manifest."""
    return Bundle(bundle.path, replace(bundle.manifest, **changes))


SUPPORTED = ("sm75", "sm86", "sm89", "sm120", "sm121")
WITH_THE_CUDA_PROVIDER = "CUDA provider with 'anydoor build CHECKPOINT --backend onnxruntime --targets cuda'"
WITH_JETPACK = "with the TensorRT of its JetPack, 'anydoor build ONNX_BUNDLE --backend tensorrt'"
UNSUPPORTED = {
    "sm70": WITH_THE_CUDA_PROVIDER,  # V100
    "sm80": WITH_THE_CUDA_PROVIDER,  # A100
    "sm87": WITH_JETPACK,  # Orin
    "sm90": WITH_THE_CUDA_PROVIDER,  # H100
    "sm100": WITH_THE_CUDA_PROVIDER,  # B200
    "sm103": WITH_THE_CUDA_PROVIDER,  # B300
    "sm110": WITH_JETPACK,  # Thor
    "sm150": WITH_THE_CUDA_PROVIDER,  # of the future
}


@pytest.mark.parametrize(("architecture", "instead"), UNSUPPORTED.items())
def test_a_card_that_the_library_does_not_support_is_told_what_works(
    plans: Bundle, library: Library, monkeypatch: pytest.MonkeyPatch, architecture: str, instead: str
) -> None:
    """Before a plan is opened, also if it claims to be for that card or is of another version; and where the
    library itself says so."""
    put_in_a_card(monkeypatch, architecture)
    sentence = (
        f"TensorRT for RTX supports {', '.join(SUPPORTED)}, and not this card, simulated, which is "
        f"{architecture}: .*{instead}"
    )
    for bundle in (
        plans,
        with_manifest(plans, target=architecture),
        with_manifest(plans, backend_version="1.2"),
    ):
        with pytest.raises(BackendError, match=sentence):
            open_engine(bundle)
        with pytest.raises(BackendError, match=sentence):
            tensorrt.examine(bundle, EngineOptions())
        with pytest.raises(BackendError, match=sentence):
            check_card(library, bundle, SimulatedDevice(architecture=architecture).card())
    unsupported = int(library.module.EngineInvalidityDiagnostics.UNSUPPORTED_CC)
    with pytest.raises(BackendError, match=sentence):
        header_refusal(library, plans, DENOISE, unsupported)


@pytest.mark.parametrize("architecture", SUPPORTED)
def test_the_cards_of_the_support_matrix_are_taken(architecture: str) -> None:
    card = SimulatedDevice(architecture=architecture).card()
    check_support(VARIANTS[RTX], card)
    check_support(VARIANTS["tensorrt"], card)


@pytest.mark.parametrize("architecture", UNSUPPORTED)
def test_tensorrt_takes_every_card(architecture: str) -> None:
    check_support(VARIANTS["tensorrt"], SimulatedDevice(architecture=architecture).card())


def test_plans_for_sm80_are_read_and_not_built_again(
    plans: Bundle, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library builds them, and supports no such card."""
    put_in_a_card(monkeypatch, "sm89")
    both, alone = with_manifest(plans, target="sm80,sm89"), with_manifest(plans, target="sm80")
    for bundle in (both, alone):
        assert tensorrt.examine(bundle, EngineOptions())[0] == "simulated"
    malformed = int(library.module.EngineInvalidityDiagnostics.MALFORMED_ENGINE)
    assert "--backend tensorrt_rtx --targets sm89'" in str(header_refusal(library, both, DENOISE, malformed))
    assert "--backend tensorrt_rtx'" in str(header_refusal(library, alone, DENOISE, malformed))
