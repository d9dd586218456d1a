"""OpenVINO beside ONNX Runtime on the same bundle: what only it has, and what it refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engines import host_memory
from engines.backends.openvino.engine import OpenVinoEngine, plan_memory, precisions
from engines.bundle import Bundle, file_record
from engines.cache_folder import keep
from engines.engine import open_engine
from engines.errors import BackendError, BundleError
from engines.options import EngineOptions
from export.example_inputs import example_inputs
from tests.support.anydoor import DECODE, DENOISE, ID_ENCODER

pytest.importorskip("openvino", reason="needs pip install '.[openvino]'")

SIZES = {"samples": 1, "rows": 1, "conditions": 1, "maps": 1}
OPENVINO = EngineOptions(backend="openvino", device="cpu")


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


def test_every_processor_computes_in_float32() -> None:
    assert "fp32" in precisions()


def test_bfloat16_runs_where_the_processor_has_it_and_is_refused_elsewhere(bundle: Bundle) -> None:
    inputs = example_inputs(bundle.manifest.specs[ID_ENCODER], SIZES)
    if "bf16" not in precisions():
        with pytest.raises(BackendError, match="no bf16 arithmetic: run with --inference-precision fp32"):
            open_engine(bundle, replace(OPENVINO, inference_precision="bf16"))
        return
    exact, rounded = (
        open_engine(bundle, replace(OPENVINO, inference_precision=precision)).run(ID_ENCODER, inputs)
        for precision in ("fp32", "bf16")
    )
    difference = np.linalg.norm(exact["tokens"] - rounded["tokens"]) / np.linalg.norm(exact["tokens"])
    assert 0 < difference < 0.1


def test_a_result_survives_the_next_call(bundle: Bundle) -> None:
    engine = open_engine(bundle, OPENVINO)
    first, second = (example_inputs(bundle.manifest.specs[DECODE], SIZES, seed) for seed in (0, 1))
    picture = engine.run(DECODE, first, ["image"])["image"]
    before = engine.to_host(picture)
    engine.run(DECODE, second, ["image"])
    np.testing.assert_array_equal(engine.to_host(picture), before)


def test_inputs_that_have_to_be_copied_live_until_the_call_has_run(bundle: Bundle) -> None:
    """The library points into arrays without keeping them: copies of views must not be freed too early."""
    engine = open_engine(bundle, OPENVINO)
    inputs = example_inputs(bundle.manifest.specs[DENOISE], SIZES)
    views = {
        name: np.repeat(array, 2, axis=-1)[..., ::2] if array.ndim else array
        for name, array in inputs.items()
    }
    assert any(not view.flags.c_contiguous for view in views.values())
    expected, found = engine.run(DENOISE, inputs), engine.run(DENOISE, views)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_number_of_threads_is_that_of_the_library(bundle: Bundle) -> None:
    engine = OpenVinoEngine(bundle, EngineOptions(threads=1))
    engine.load(ID_ENCODER)
    compiled = engine._requests[ID_ENCODER].get_compiled_model()
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1


def test_graph_that_it_cannot_read(
    tiny_bundle: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    monkeypatch.setattr(copy, "verify", lambda graph: None)
    copy.graph_file(DECODE).write_bytes(b"no graph")
    with pytest.raises(BundleError, match="OpenVINO cannot load the graph 'decode'"):
        open_engine(copy, OPENVINO).load(DECODE)


def test_the_pages_of_its_files_count_against_a_budget_only(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system may take them back, so they are no reason to swap graphs where nobody promised a size."""
    together = plan_memory(bundle, None)
    monkeypatch.setattr(host_memory, "free_host_memory", lambda: int(together.total / 0.9) + 1)
    assert len(plan_memory(bundle, None).groups) == 1
    files = sum(file.bytes for record in bundle.manifest.graphs.values() for file in record.files)
    promised = plan_memory(bundle, 10**12)
    assert promised.total - together.total == pytest.approx(files, abs=len(together.graphs))
    assert len(plan_memory(bundle, promised.total).groups) == 1
    assert len(plan_memory(bundle, promised.total - 1).groups) > 1


# --- what is kept for the next start ----------------------------------------------------------------------


def resident_bytes() -> int:
    host_memory.trim()
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_under_a_budget_scratch_memory_is_freed_when_graphs_of_another_phase_run(bundle: Bundle) -> None:
    """The library keeps it for the next run of the graph; a plan counts that of one phase at a time."""
    other = example_inputs(bundle.manifest.specs[DECODE], SIZES)
    many = example_inputs(bundle.manifest.specs[DENOISE], dict.fromkeys(SIZES, 128))
    grown, latents = [], []
    for budget in (10**10, None):
        engine = open_engine(bundle, replace(OPENVINO, threads=1, memory_budget=budget))
        engine.load(DENOISE)
        engine.run(DECODE, other)
        before = resident_bytes()
        for _ in range(2):
            latents.append(engine.run(DENOISE, many)["epsilon"])
            engine.run(DECODE, other)
        grown.append(resident_bytes() - before)
        engine.close()
    assert all((latent == latents[0]).all() for latent in latents)
    assert grown[0] < grown[1] / 3


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for what is kept."""
    monkeypatch.setenv("ANYDOOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def blobs(cache: Path) -> list[Path]:
    return sorted(cache.glob("anydoor/openvino/*.blob"))


def decode(bundle: Bundle, **options: Any) -> tuple[NDArray[np.uint8], bool]:
    """A picture drawn by a new engine, and whether that found its graph compiled.

    What was compiled anew is written into a new file.
    """
    cache = Path(os.environ["ANYDOOR_CACHE"])
    before = {blob: blob.stat().st_ino for blob in blobs(cache)}
    engine = OpenVinoEngine(bundle, EngineOptions(**options))
    picture = engine.run(DECODE, example_inputs(bundle.manifest.specs[DECODE], SIZES), ["image"])["image"]
    after = {blob: blob.stat().st_ino for blob in blobs(cache)}
    return picture, bool(before) and before == after


def test_the_second_start_takes_what_the_first_compiled_and_draws_the_same(
    bundle: Bundle, cache: Path
) -> None:
    first, second = decode(bundle), decode(bundle)
    assert [first[1], second[1]] == [False, True]
    np.testing.assert_array_equal(first[0], second[0])
    weights = (bundle.path / "decode.onnx.data").stat().st_size
    assert sum(blob.stat().st_size for blob in blobs(cache)) < weights / 2


def test_other_options_are_compiled_anew(bundle: Bundle, cache: Path) -> None:
    assert not decode(bundle)[1]
    assert not decode(bundle, threads=1)[1]
    assert decode(bundle, threads=1)[1]


def test_other_weights_are_compiled_anew(bundle: Bundle, cache: Path, tmp_path: Path) -> None:
    """Even where the graph's own file is the same, with its time, and in the same place."""
    place = tmp_path / "bundle"
    shutil.copytree(bundle.path, place)
    before = decode(Bundle.open(place))[0]
    weights = place / "decode.onnx.data"
    values = np.fromfile(weights, np.float32)
    (values * np.float32(0.9)).tofile(weights)
    manifest = Bundle.open(place).manifest
    record = manifest.graphs[DECODE]
    files = (record.files[0], file_record(place, weights.name))
    graphs = {**manifest.graphs, DECODE: replace(record, files=files)}
    after, found = decode(Bundle(place, replace(manifest, graphs=graphs)))
    assert not found
    assert not np.array_equal(after, before)


def flip(content: bytes, place: int) -> bytes:
    """The content with one bit changed."""
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda content: b"",
    "other": lambda content: b"x" * 100,
    "cut short": lambda content: content[: len(content) // 2],
    **{
        f"bit at {part}/7": lambda content, part=part: flip(content, len(content) * part // 7)  # type: ignore[misc]
        for part in range(7)
    },
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_anew(bundle: Bundle, cache: Path, damage: str) -> None:
    expected = decode(bundle)[0]
    (blob,) = blobs(cache)
    blob.write_bytes(DAMAGES[damage](blob.read_bytes()))
    picture, found = decode(bundle)
    assert not found
    np.testing.assert_array_equal(picture, expected)
    again, found = decode(bundle)
    assert found
    np.testing.assert_array_equal(again, expected)


def test_what_the_library_cannot_read_is_made_anew(bundle: Bundle, cache: Path) -> None:
    expected = decode(bundle)[0]
    (blob,) = blobs(cache)
    keep(blob, b"of another version")
    picture, found = decode(bundle)
    assert not found
    np.testing.assert_array_equal(picture, expected)


def test_what_was_compiled_and_not_used_for_long_is_thrown_away(bundle: Bundle, cache: Path) -> None:
    decode(bundle)
    (old,) = blobs(cache)
    os.utime(old, (0, 0))
    decode(bundle, threads=1)
    assert not old.exists()
    assert decode(bundle, threads=1)[1]


def test_nothing_is_kept_where_nothing_can_be_written(bundle: Bundle, cache: Path) -> None:
    cache.write_bytes(b"in place of the folder")
    for _ in range(2):
        picture, found = decode(bundle)
        assert not found
    assert picture.any()


def test_nvidia_cards_are_for_others(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match="OpenVINO does not run on NVIDIA cards"):
        open_engine(bundle, replace(OPENVINO, device="cuda"))


def test_neither_converters_nor_telemetry_are_imported(tiny_bundle: Path) -> None:
    code = (
        "import sys; from engines.bundle import Bundle; from engines.engine import open_engine;"
        "from engines.options import EngineOptions;"
        f"open_engine(Bundle.open({str(tiny_bundle)!r}), EngineOptions('openvino')).load('decode');"
        "print(sorted(name for name in sys.modules if 'telemetry' in name or 'ovc' in name))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("closed_by", ["the thread that opened them", "another thread"])
def test_signals_are_handled_after_engines_are_closed(closed_by: str, tiny_bundle: Path) -> None:
    """Two engines at once, the older one closed first: Ctrl-C still arrives, and does not kill."""
    code = f"""
import gc, os, signal, threading
from pathlib import Path
from engines.bundle import Bundle
from engines.engine import open_engine
from engines.options import EngineOptions
from tests.support.anydoor import DECODE

arrived = []
signal.signal(signal.SIGINT, lambda number, frame: arrived.append(number))
bundle = Bundle.open(Path({str(tiny_bundle)!r}))
engines = [open_engine(bundle, EngineOptions("openvino")) for _ in range(2)]

def close():
    while engines:
        engines.pop(0)
        gc.collect()

for engine in engines:
    engine.load(DECODE)
del engine
if {closed_by == "another thread"}:
    thread = threading.Thread(target=close)
    thread.start()
    thread.join()
close()
os.kill(os.getpid(), signal.SIGINT)
assert arrived == [signal.SIGINT]
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
