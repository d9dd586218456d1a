"""Plans of TensorRT for RTX, really built: no card is needed for that, only to run them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.backends.tensorrt.library import Library, check_header, check_version, load_library
from engines.backends.tensorrt.plans import check_signature
from engines.bundle import Bundle
from engines.errors import AnyDoorError, BundleError
from engines.manifest import Manifest
from engines.spec import sizes_for
from export import build
from export.build import best_backend, build_plan_bundle
from export.build_engines import main
from export.options import BuildOptions
from export.plans import (
    Phase,
    build_plan,
    build_plans,
    check_targets,
    completed,
    network_signature,
    new_config,
    scratch_bytes,
)
from export.progress import Progress
from tests.support.anydoor import CONTROL, GRAPHS, ID_ENCODER
from tests.support.cards import no_card
from tests.support.format_1 import OLD_BUNDLE
from tests.support.simulated_card import SimulatedDevice

RTX = "tensorrt_rtx"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def library() -> Library:
    pytest.importorskip(RTX, reason="needs pip install '.[tensorrt]'")
    return load_library(RTX)


@pytest.fixture(scope="module")
def half(tiny_half_bundle: Path) -> Bundle:
    return Bundle.open(tiny_half_bundle)


@pytest.fixture(scope="module")
def plans(tiny_half_plan_bundle: Path) -> Bundle:
    """Built in a process without PyTorch."""
    return Bundle.open(tiny_half_plan_bundle)


@pytest.fixture(
    scope="module", params=["tiny", "tiny_half", pytest.param("small", marks=pytest.mark.nightly)]
)
def built(request: pytest.FixtureRequest) -> tuple[Bundle, Bundle]:
    """ONNX graphs, and the plans built from them."""
    fixtures = (f"{request.param}_bundle", f"{request.param}_plan_bundle")
    source, plans = (Bundle.open(request.getfixturevalue(fixture)) for fixture in fixtures)
    return source, plans


def test_all_graphs_are_built_for_three_architectures(built: tuple[Bundle, Bundle], library: Library) -> None:
    source, plans = built
    for graph, record in plans.manifest.graphs.items():
        plans.verify(graph)
        assert record.files[0].path == f"{graph}.plan"
        assert record.scratch_bytes.keys() == {RTX}
        assert record.scratch_bytes[RTX] > 0
        assert record.error == source.manifest.graphs[graph].error
    assert (plans.manifest.backend, plans.manifest.backend_version) == (RTX, library.version)
    assert plans.manifest.target == "sm86,sm89,sm120"
    assert list(plans.manifest.graphs) == list(GRAPHS)
    assert plans.manifest.precision == source.manifest.precision


def test_products_of_float32_numbers_are_not_rounded_to_tf32(library: Library) -> None:
    """The library would allow that by itself."""
    trt = library.module
    builder = trt.Builder(library.logger)
    assert builder.create_builder_config().get_flag(trt.BuilderFlag.TF32)
    assert not new_config(library, builder).get_flag(trt.BuilderFlag.TF32)


def test_constants_and_signatures_are_those_of_the_source(built: tuple[Bundle, Bundle]) -> None:
    source, plans = built
    assert plans.manifest.specs == source.manifest.specs
    assert plans.manifest.constants.sha256 == source.manifest.constants.sha256
    assert plans.constants().keys() == source.constants().keys()


def test_headers_are_plans_of_this_version(built: tuple[Bundle, Bundle], library: Library) -> None:
    """Without a driver the library cannot say that a plan is valid, but it names every fault it sees."""
    _, plans = built
    check_version(library, plans)
    for graph in GRAPHS:
        check_header(library, plans, graph)


@pytest.mark.parametrize("name", ["/tmp/escaped", "../escaped", ".hidden", "a b", ""])
def test_names_of_graphs_that_no_file_may_have(half: Bundle, tmp_path: Path, name: str) -> None:
    """They are whatever the source's manifest says."""
    graphs = {name: half.manifest.graphs[ID_ENCODER]}
    source = replace(half, manifest=replace(half.manifest, graphs=graphs))
    library: Any = None  # which is not asked for anything
    with pytest.raises(AnyDoorError, match="is not named by letters, digits, and"):
        build_plans(source, tmp_path / "plans", library, Progress(quiet=True), 1)


def parse(library: Library, path: Path) -> Any:
    """A network as TensorRT reads it, and what must live as long as it does."""
    trt = library.module
    builder = trt.Builder(library.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, library.logger)
    assert parser.parse_from_file(str(path))
    return network, parser, builder


@pytest.mark.parametrize("graph", GRAPHS)
def test_inputs_and_outputs_are_those_of_the_manifest(
    built: tuple[Bundle, Bundle], library: Library, graph: str
) -> None:
    source, plans = built
    network, *_ = parse(library, source.graph_file(graph))
    tensors, spec = network_signature(network), plans.manifest.specs[graph]
    assert [t.spec.name for t in tensors] == [t.name for t in spec.tensors]
    check_signature(tensors, spec, plans.manifest.largest_sizes)
    other = replace(spec.inputs[0], dtype="int32")
    for wrong in (
        replace(spec, inputs=(other, *spec.inputs[1:])),
        replace(spec, inputs=spec.inputs[1:]),
        replace(spec, outputs=(replace(spec.outputs[0], shape=(1, 2)), *spec.outputs[1:])),
    ):
        with pytest.raises(BundleError, match=f"of '{graph}'"):
            check_signature(tensors, wrong, plans.manifest.largest_sizes)


def test_too_small_a_plan_is_noticed(half: Bundle, library: Library) -> None:
    network, *_ = parse(library, half.graph_file(ID_ENCODER))
    spec = half.manifest.specs[ID_ENCODER]
    reference, tokens = network_signature(network)
    for_two = replace(reference, largest=(2, 3, 224, 224))
    check_signature([for_two, tokens], spec, sizes_for(half.manifest.dimensions, 2))
    with pytest.raises(BundleError, match=r"up to \(2, 3, 224, 224\), and the manifest says .* \(4, 3"):
        check_signature([for_two, tokens], spec, sizes_for(half.manifest.dimensions, 4))


def test_a_plan_keeps_the_names_of_the_file_that_it_is_built_from(half: Bundle, library: Library) -> None:
    """The manifest may have given an input another name since that file was exported."""
    spec = half.manifest.specs[ID_ENCODER]
    renamed = replace(spec, inputs=(replace(spec.inputs[0], name="picture", file_name="reference"),))
    record = replace(half.manifest.graphs[ID_ENCODER], spec=renamed)
    manifest = replace(half.manifest, graphs={**half.manifest.graphs, ID_ENCODER: record})
    onnx_file = half.graph_file(ID_ENCODER)
    with Progress(quiet=True) as progress:
        assert build_plan(library, manifest, ID_ENCODER, onnx_file, "sm89", progress).content is not None
    network, *_ = parse(library, onnx_file)
    unnamed = replace(spec, inputs=(replace(spec.inputs[0], name="picture"),))
    with pytest.raises(BundleError, match="has other inputs and outputs"):
        check_signature(network_signature(network), unnamed, manifest.largest_sizes)


def test_plans_can_be_built_from_graphs_whose_inputs_had_other_names(library: Library) -> None:
    """Those of format 1 were exported with `noise`, `guidance` and `strength`."""
    bundle = Bundle.open(OLD_BUNDLE)
    stored = {of.name: of.stored_name for of in bundle.manifest.step.inputs if of.stored_name != of.name}
    assert stored == {"carry": "noise", "guidance_scale": "guidance", "control_scale": "strength"}
    for graph, spec in bundle.manifest.specs.items():
        network, *_ = parse(library, bundle.graph_file(graph))
        check_signature(network_signature(network), spec, bundle.manifest.largest_sizes)


class Percentages(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.seen: list[float] = []

    def percent(self, done: float) -> None:
        self.seen.append(done)


def test_the_build_reports_its_progress(half: Bundle, library: Library) -> None:
    with Percentages() as progress:
        plan = build_plan(library, half.manifest, ID_ENCODER, half.graph_file(ID_ENCODER), "sm89", progress)
    assert plan.scratch_bytes > 0
    assert progress.seen == sorted(progress.seen)
    assert len(set(progress.seen)) > 10
    assert progress.seen[-1] == pytest.approx(1, abs=0.01)


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX")
def test_kernel_timings_are_kept(
    half: Bundle, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT for RTX has the calls of TensorRT for it, though it times nothing."""
    monkeypatch.setattr(library, "variant", replace(library.variant, times_kernels=True))
    cache = tmp_path / "timings"

    def build() -> None:
        onnx_file = half.graph_file(ID_ENCODER)
        with Progress(quiet=True) as progress:
            build_plan(library, half.manifest, ID_ENCODER, onnx_file, "sm89", progress, cache)

    build()
    kept = cache.read_bytes()
    assert kept
    cache.write_bytes(b"of another version")
    build()
    assert cache.read_bytes() == kept
    assert list(tmp_path.iterdir()) == [cache]


def test_a_graph_that_cannot_be_read_is_refused(half: Bundle, library: Library, tmp_path: Path) -> None:
    broken = tmp_path / "control.onnx"
    broken.write_bytes(half.graph_file(CONTROL).read_bytes()[:5000])
    with (
        pytest.raises(AnyDoorError, match="cannot read the graph 'control'"),
        Progress(quiet=True) as progress,
    ):
        build_plan(library, half.manifest, CONTROL, broken, "sm89", progress)


def test_a_graph_that_is_not_the_manifests_is_refused(half: Bundle, library: Library) -> None:
    with (
        pytest.raises(BundleError, match="plan of 'control' has other inputs"),
        Progress(quiet=True) as progress,
    ):
        build_plan(library, half.manifest, CONTROL, half.graph_file(ID_ENCODER), "sm89", progress)


def test_targets(library: Library) -> None:
    assert check_targets(library, ()) == ("sm86", "sm89", "sm120")
    assert check_targets(library, ("sm75",)) == ("sm75",)
    sentence = (
        "supports sm75, sm86, sm89, sm120, sm121, not sm87, sm90: .* --targets cuda, or with --backend "
        "tensorrt on a machine"
    )
    with pytest.raises(AnyDoorError, match=sentence):
        check_targets(library, ("sm89", "sm87", "sm90"))


@pytest.mark.parametrize("target", ["sm80", "sm87", "sm90", "sm100", "sm110", "sm99"])
def test_a_target_outside_the_support_matrix_is_refused_before_the_work(
    library: Library, half: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    command = [str(half.path), "--backend", RTX, "--targets", f"sm89,{target}", "--quiet"]
    assert main([*command, "--output", str(tmp_path / "new")]) == 2
    assert f"supports sm75, sm86, sm89, sm120, sm121, not {target}: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"backend": "onnxruntime"}, "is a bundle already"),
        ({"backend": RTX, "max_batch": 0}, "--max-batch must be from 1 to 4096"),
        ({"backend": RTX, "targets": ("sm87",)}, "not sm87"),
        ({"backend": "openvino"}, "there is no backend 'openvino'"),
    ],
)
def test_unusable_options_are_refused(
    library: Library, half: Bundle, tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(AnyDoorError, match=sentence):
        build_plan_bundle(half, tmp_path / "new", BuildOptions(**options))
    assert list(tmp_path.iterdir()) == []


def test_plans_are_not_built_from_plans_nor_over_their_source(
    library: Library, plans: Bundle, half: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(AnyDoorError, match="plans are built from a bundle of ONNX graphs"):
        build_plan_bundle(plans, tmp_path / "new", BuildOptions(backend=RTX))
    with pytest.raises(AnyDoorError, match="give another --output"):
        build_plan_bundle(half, half.path, BuildOptions(backend=RTX))


def test_plans_are_not_built_from_graphs_of_the_cuda_provider(
    library: Library, half: Bundle, tmp_path: Path
) -> None:
    fused = Bundle(half.path, replace(half.manifest, target="cuda"))
    with pytest.raises(AnyDoorError, match=r"which TensorRT for RTX does not have: .* --targets any"):
        build_plan_bundle(fused, tmp_path / "new", BuildOptions(backend=RTX))
    assert list(tmp_path.iterdir()) == []


def test_without_pytorch_only_a_bundle_will_do(tmp_path: Path) -> None:
    """As on a Jetson."""
    code = "import sys; sys.modules['torch'] = None; from export.build_engines import main; sys.exit(main())"
    (tmp_path / "anydoor.safetensors").write_bytes(b"weights")
    command = [sys.executable, "-c", code, str(tmp_path / "anydoor.safetensors"), "--backend", "onnxruntime"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 2
    assert "'torch' is not installed" in result.stderr
    assert "or give a bundle of ONNX graphs" in result.stderr.splitlines()[-1]


def test_a_damaged_source_leaves_nothing_behind(
    library: Library, half: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(half.path, copy)
    weights = copy / f"{ID_ENCODER}.onnx.data"
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    assert main([str(copy), "--output", str(tmp_path / "new"), "--backend", RTX, "--quiet"]) == 2
    assert "id_encoder.onnx.data is not the file that was built" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.skipif(not no_card(), reason="there is a card")
def test_without_a_card_auto_means_onnx_runtime() -> None:
    assert best_backend() == "onnxruntime"


@pytest.mark.parametrize(
    ("architecture", "installed", "expected"),
    [
        ("sm75", {RTX, "tensorrt"}, RTX),
        ("sm89", {RTX}, RTX),
        ("sm121", {RTX, "tensorrt"}, RTX),
        ("sm80", {RTX}, "onnxruntime"),
        ("sm80", {RTX, "tensorrt"}, "tensorrt"),
        ("sm87", {RTX, "tensorrt"}, "tensorrt"),
        ("sm90", {RTX}, "onnxruntime"),
        ("sm100", {RTX}, "onnxruntime"),
        ("sm110", {RTX, "tensorrt"}, "tensorrt"),
        ("sm150", {RTX}, "onnxruntime"),
        ("sm150", set(), "onnxruntime"),
    ],
)
def test_auto_is_what_supports_the_card(
    monkeypatch: pytest.MonkeyPatch, architecture: str, installed: set[str], expected: str
) -> None:
    monkeypatch.setattr(build, "Device", lambda: SimulatedDevice(architecture=architecture))
    monkeypatch.setattr(build, "find_spec", lambda name: name in installed)
    assert best_backend() == expected


phases = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 49)), min_size=1, max_size=5)


@given(phases)
def test_progress_is_a_part_of_the_whole(steps: list[tuple[int, int]]) -> None:
    """Phases within phases: each can tell no more than one step of the one around it."""
    tree = {
        str(i): Phase(str(i - 1) if i else None, count, min(done, count - 1))
        for i, (count, done) in enumerate(steps)
    }
    part, root = completed(tree, str(len(steps) - 1)), tree["0"]
    assert root.done / root.steps <= part <= (root.done + 1) / root.steps
    assert completed(tree, "another") == 0.0


def test_scratch_memory_is_read_from_the_log() -> None:
    log = [("INFO", "Total Weights Memory: 7 bytes"), ("INFO", "Total Activation Memory: 10916352 bytes")]
    assert scratch_bytes(log) == 10916352
    assert scratch_bytes([("INFO", "Total Activation Memory: 10916352")]) == 10916352
    assert scratch_bytes(log[:1]) == 0


def test_the_manifest_keeps_the_scratch_memory(plans: Bundle) -> None:
    assert isinstance(plans.manifest, Manifest)
    assert '"scratch_bytes": ' in plans.manifest.to_json()
    assert Bundle.open(plans.path).manifest == plans.manifest
