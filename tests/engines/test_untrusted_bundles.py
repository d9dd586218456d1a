"""Bundles that nobody should trust: what is in them is checked before it is used, and refused in a sentence.

Hashes say nothing here: whoever writes a bundle writes the hashes, too.
"""

from __future__ import annotations

import io
import json
import mmap
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from engines.bundle import CONSTANTS, Bundle, file_record
from engines.errors import BundleError
from engines.manifest import MANIFEST
from engines.onnx_file import ExternalData, external_data
from engines.options import EngineOptions
from runtime import Compositor
from tests.support.anydoor import DENOISE, GRAPHS, ID_ENCODER
from tests.support.format_1 import OLD_BUNDLE

Content = dict[str, Any]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of a bundle, to be damaged."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def edit_manifest(bundle: Path, change: Callable[[Content], object]) -> None:
    content = json.loads((bundle / MANIFEST).read_text())
    change(content)
    (bundle / MANIFEST).write_text(json.dumps(content))


def set_hash(bundle: Path, name: str) -> None:
    """Gives a file of the graph for steps, or the constants, the hash and size that it has."""

    def change(content: Content) -> None:
        for record in (content["constants"], *content["graphs"][DENOISE]["files"]):
            if record["path"] == name:
                record.update(vars(file_record(bundle, name)))

    edit_manifest(bundle, change)


def refused(bundle: Path) -> str:
    """The sentence with which a bundle is not opened."""
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


# --- the manifest -----------------------------------------------------------------------------------------

TEXTS = {
    "[" * 200_000: "is not valid JSON",
    '{"format": NaN}': "NaN is not a finite number",
    '{"format": 1e400}': "1e400 is not a finite number",
    '{"format": 1, "format": 2}': "the key 'format' is there twice",
    " " * (17 << 20): "it has more than 16 MiB",
}


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_text_that_nobody_would_write(bundle: Path, text: str) -> None:
    (bundle / MANIFEST).write_text(text)
    assert TEXTS[text] in refused(bundle)


VALUES: dict[str, tuple[tuple[str | int, ...], Any]] = {
    "max_batch must be a whole number from 1 to 4096, not 1000000000": (("max_batch",), 10**9),
    "max_batch must be a whole number from 1 to 4096, not True": (("max_batch",), True),
    "dimensions.rows must be a whole number from 1 to 4096, not 0": (("dimensions", "rows"), 0),
    "precision must be one of fp32, fp16, not 5": (("precision",), 5),
    "checkpoint must be an object of at most 4096 fields, not 5": (("checkpoint",), 5),
    "backend must be printable text, not '\\x1b[2J'": (("backend",), "\x1b[2J"),
    "graphs must be an object of at most 4096 fields, not []": (("graphs",), []),
    "constants.bytes must be a whole number from 0": (("constants", "bytes"), -1),
    "constants.path must be a path of at most 200 letters": (("constants", "path"), "a" * 5000),
    "constants.sha256 must be a SHA-256": (("constants", "sha256"), "../x"),
    f"graphs.{DENOISE}.files must be a list of 1 to 4096 entries, not []": (("graphs", DENOISE, "files"), []),
    f"graphs.{DENOISE}.files[0].bytes must be": (("graphs", DENOISE, "files", 0, "bytes"), 1.5),
    f"graphs.{DENOISE}.scratch_bytes.onnxruntime must be": (
        ("graphs", DENOISE, "scratch_bytes", "onnxruntime"),
        10**300,
    ),
    "dtype must be one of float32, float16, int32, uint8, not 'object'": (
        ("graphs", DENOISE, "inputs", 0, "dtype"),
        "object",
    ),
    "shape[1] must be a whole number": (("graphs", DENOISE, "inputs", 0, "shape"), ["samples", -5]),
    "would take more than 1 TiB": (("graphs", DENOISE, "inputs", 0, "shape"), [1, 1 << 24, 1 << 24, 8]),
    "a file of 'denoise' is not named *.onnx": (("graphs", DENOISE, "files", 0, "path"), "graph.xml"),
}


@pytest.mark.parametrize("sentence", VALUES)
def test_a_value_that_cannot_be_there(bundle: Path, sentence: str) -> None:
    place, value = VALUES[sentence]

    def change(content: Any) -> None:
        for key in place[:-1]:
            content = content[key]
        content[place[-1]] = value

    edit_manifest(bundle, change)
    assert sentence in refused(bundle)


@pytest.mark.parametrize("resolution", ["96", -5, 10**9])
def test_a_value_that_cannot_be_in_a_manifest_of_version_1(tmp_path: Path, resolution: Any) -> None:
    shutil.copyfile(OLD_BUNDLE / MANIFEST, tmp_path / MANIFEST)
    edit_manifest(tmp_path, lambda content: content["model"].update(resolution=resolution))
    assert "model.resolution must be a whole number" in refused(tmp_path)


def test_fields_that_a_later_version_may_add_are_ignored(bundle: Path) -> None:
    edit_manifest(bundle, lambda content: content.update(colour="blue"))
    assert Bundle.open(bundle).manifest.system == "anydoor"


@pytest.mark.parametrize(("name", "value"), [("steps", "x"), ("sampler", []), ("crop_ratio", {})])
def test_defaults_that_no_request_could_be_drawn_with(bundle: Path, name: str, value: Any) -> None:
    edit_manifest(bundle, lambda content: content["defaults"].update({name: value}))
    with pytest.raises(BundleError, match="unusable defaults"):
        Compositor.load(bundle, EngineOptions(device="cpu"))


# --- constants --------------------------------------------------------------------------------------------


def archive(**members: bytes) -> bytes:
    """A compressed zip file."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file:
        for name, member in members.items():
            file.writestr(f"{name}.npy", member)
    return content.getvalue()


def array(values: Any) -> bytes:
    """An .npy file."""
    content = io.BytesIO()
    np.save(content, values)
    return content.getvalue()


SCHEDULE = np.linspace(0.99, 0.01, 1000, dtype=np.float32)
WITH_NAN = np.where(np.arange(1000) == 500, np.float32(np.nan), SCHEDULE)

CONSTANT_FILES: dict[str, tuple[str, bytes]] = {
    "no zip file": ("BadZipFile", b"PK\x03\x04 and no more"),
    "no schedule": ("has no alphas_cumprod", archive(other=array(SCHEDULE))),
    "a short schedule": ("has no alphas_cumprod", archive(alphas_cumprod=array(SCHEDULE[:3]))),
    "a schedule of doubles": ("float32", archive(alphas_cumprod=array(SCHEDULE.astype(np.float64)))),
    "a schedule that rises": ("do not fall from 1 to 0", archive(alphas_cumprod=array(SCHEDULE[::-1]))),
    "numbers that are none": ("not finite", archive(alphas_cumprod=array(WITH_NAN))),
    "objects": ("does not hold the numbers", archive(alphas_cumprod=array(np.array([{}])))),
    "a header that claims 12 GB": (
        "does not hold the numbers",
        archive(
            alphas_cumprod=array(SCHEDULE).replace(b"(1000,)", b"(3000000000,)").replace(b" " * 6, b"", 1)
        ),
    ),
    "a damaged header": (
        "cannot be read",
        archive(alphas_cumprod=array(SCHEDULE).replace(b"{'descr'", b"{'''scr'")),
    ),
    "more than it may unpack to": ("more than 64 arrays or 64 MiB", archive(a=bytes(1 << 26), b=b"x")),
    "many arrays": ("more than 64 arrays", archive(**{f"a{number}": b"" for number in range(100)})),
}


@pytest.mark.parametrize("kind", CONSTANT_FILES)
def test_constants_that_cannot_be_used(bundle: Path, kind: str) -> None:
    sentence, content = CONSTANT_FILES[kind]
    (bundle / CONSTANTS).write_bytes(content)
    set_hash(bundle, CONSTANTS)
    with pytest.raises(BundleError, match=sentence) as caught:
        Bundle.open(bundle).constants()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tokens", [None, np.zeros((1, 3, 3), np.float32)])
def test_constants_that_the_system_cannot_use(bundle: Path, tokens: Any) -> None:
    others = {} if tokens is None else {"unconditional_tokens": array(tokens)}
    (bundle / CONSTANTS).write_bytes(archive(alphas_cumprod=array(SCHEDULE), **others))
    set_hash(bundle, CONSTANTS)
    with pytest.raises(BundleError, match=r"no constant 'unconditional_tokens' \(1, 257, 32\) float32"):
        Compositor.load(bundle, EngineOptions(device="cpu"))


def test_a_graph_without_the_tensors_that_the_system_needs(bundle: Path) -> None:
    edit_manifest(bundle, lambda content: content["graphs"][ID_ENCODER].update(outputs=[]))
    with pytest.raises(BundleError, match="the graph 'id_encoder' has no tensor 'tokens'"):
        Compositor.load(bundle, EngineOptions(device="cpu"))


# --- the files that graphs name ---------------------------------------------------------------------------


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_weights_that_a_graph_names_are_found(tiny_bundle: Path, graph: str) -> None:
    bundle = Bundle.open(tiny_bundle)
    for target in ("any", "cpu"):
        path = bundle.graph_file(graph, target)
        model = onnx.load(path, load_external_data=False)
        entries = [
            {entry.key: entry.value for entry in tensor.external_data}
            for tensor in model.graph.initializer
            if tensor.external_data
        ]
        found = list(external_data(path.read_bytes()))
        assert {(of.location, of.offset, of.length) for of in found} == {
            (entry["location"], int(entry["offset"]), int(entry["length"])) for entry in entries
        }
        assert {of.location for of in found} == {f"{graph}.onnx.data"}


def test_weights_that_the_manifest_does_not_list(bundle: Path) -> None:
    edit_manifest(bundle, lambda content: content["graphs"][DENOISE]["files"].pop())
    weights = bundle / "denoise.onnx.data"
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(
        BundleError, match=r"takes weights from 'denoise\.onnx\.data', which the manifest does"
    ):
        Bundle.open(bundle).verify(DENOISE)


def a_tensor(location: str, **place: int) -> onnx.TensorProto:
    """One that lies in another file."""
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[1], data_location=1)
    for key, value in {"location": location, **place}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def as_initializer(tensor: onnx.TensorProto) -> onnx.GraphProto:
    return onnx.GraphProto(initializer=[tensor])


def as_constant(tensor: onnx.TensorProto) -> onnx.GraphProto:
    value = onnx.AttributeProto(name="value", type=4, t=tensor)
    return onnx.GraphProto(node=[onnx.NodeProto(op_type="Constant", attribute=[value])])


def in_a_branch(tensor: onnx.TensorProto) -> onnx.GraphProto:
    branch = onnx.AttributeProto(name="then_branch", type=5, g=as_constant(tensor))
    return onnx.GraphProto(node=[onnx.NodeProto(op_type="If", attribute=[branch])])


@pytest.mark.parametrize("place", [as_initializer, as_constant, in_a_branch])
@pytest.mark.parametrize(
    "location", ["../x", "/etc/passwd", "a/../../x", "*/_ORT_MEM_ADDR_/*", "other.data", "", "manifest.json"]
)
def test_a_graph_may_name_only_the_file_that_is_listed(
    bundle: Path, location: str, place: Callable[[onnx.TensorProto], onnx.GraphProto]
) -> None:
    (bundle / "other.data").write_bytes(bytes(8))
    (bundle / "denoise.onnx").write_bytes(
        onnx.ModelProto(graph=place(a_tensor(location, offset=0, length=4))).SerializeToString()
    )
    set_hash(bundle, "denoise.onnx")
    with pytest.raises(BundleError, match="which the manifest does not list"):
        Bundle.open(bundle).verify(DENOISE)


def with_attribute(**value: Any) -> onnx.GraphProto:
    return onnx.GraphProto(node=[onnx.NodeProto(attribute=[onnx.AttributeProto(name="a", **value)])])


WEIGHTS = a_tensor("x", offset=8, length=4)
SPARSE = onnx.SparseTensorProto(values=WEIGHTS)
PLACES = {
    "values": onnx.ModelProto(graph=onnx.GraphProto(sparse_initializer=[SPARSE])),
    "indices": onnx.ModelProto(
        graph=onnx.GraphProto(sparse_initializer=[onnx.SparseTensorProto(indices=WEIGHTS)])
    ),
    "tensors": onnx.ModelProto(graph=with_attribute(tensors=[WEIGHTS])),
    "graphs": onnx.ModelProto(graph=with_attribute(graphs=[as_initializer(WEIGHTS)])),
    "sparse tensor": onnx.ModelProto(graph=with_attribute(sparse_tensor=SPARSE)),
    "sparse tensors": onnx.ModelProto(graph=with_attribute(sparse_tensors=[SPARSE])),
    "function": onnx.ModelProto(functions=[onnx.FunctionProto(node=as_constant(WEIGHTS).node)]),
    "default of a function": onnx.ModelProto(
        functions=[onnx.FunctionProto(attribute_proto=[onnx.AttributeProto(name="a", t=WEIGHTS)])]
    ),
    "training": onnx.ModelProto(training_info=[onnx.TrainingInfoProto(algorithm=as_initializer(WEIGHTS))]),
    "its start": onnx.ModelProto(
        training_info=[onnx.TrainingInfoProto(initialization=as_initializer(WEIGHTS))]
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_weights_are_found_wherever_a_graph_may_have_them(place: str) -> None:
    assert list(external_data(PLACES[place].SerializeToString())) == [ExternalData("x", 8, 4)]


GRAPH_FILES = {
    "beyond the end": as_initializer(a_tensor("denoise.onnx.data", offset=1 << 40, length=4)),
    "takes weights from beyond": as_initializer(a_tensor("denoise.onnx.data", offset=-8, length=4)),
    "says twice where it lies": as_initializer(a_tensor("denoise.onnx.data")),
    "not an ONNX file": None,
}
GRAPH_FILES["says twice where it lies"].initializer[0].external_data.add(key="location", value="x")  # type: ignore[union-attr]


@pytest.mark.parametrize("sentence", GRAPH_FILES)
def test_a_graph_file_that_cannot_be_used(bundle: Path, sentence: str) -> None:
    graph = GRAPH_FILES[sentence]
    content = (
        b"\x3a\xff\xff\xff\xff\x0f" if graph is None else onnx.ModelProto(graph=graph).SerializeToString()
    )
    (bundle / "denoise.onnx").write_bytes(content)
    set_hash(bundle, "denoise.onnx")
    with pytest.raises(BundleError, match=sentence):
        Bundle.open(bundle).verify(DENOISE)


def test_files_that_are_links_out_of_the_bundle(bundle: Path) -> None:
    """Both libraries refuse them, in words that do not say what to do."""
    stored = shutil.move(bundle / "denoise.onnx.data", bundle.parent / "content")
    (bundle / "denoise.onnx.data").symlink_to(stored)
    assert r"denoise.onnx.data is a link to a file outside of it; copy the bundle" in refused(bundle)
    shutil.copytree(bundle, bundle.with_name("copy"), symlinks=False)
    Bundle.open(bundle.with_name("copy")).verify(DENOISE)


def test_a_writer_who_holds_a_file_mapped_is_found_where_all_is_read(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing to a page that is written already changes no time of the file, which the record goes by."""
    monkeypatch.setenv("ANYDOOR_CACHE", str(tmp_path / "cache"))
    weights = bundle / "denoise.onnx.data"
    with weights.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[0] = mapped[0]
        Bundle.open(bundle).verify(DENOISE)
        mapped[0] ^= 1
        with pytest.raises(BundleError, match=r"denoise\.onnx\.data is not the file that was built"):
            Bundle.open(bundle).verify(DENOISE, reread=True)
