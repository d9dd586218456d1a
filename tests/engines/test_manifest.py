"""The manifest: what is written is read back, and what cannot be one is refused in a sentence."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.errors import BundleError
from engines.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    FileRecord,
    GraphRecord,
    Manifest,
    TokenizerRecord,
    parse_manifest,
    read_manifest,
)
from engines.spec import ROLES, BankSpec, GraphSpec, TensorSpec

STEP = GraphSpec(
    "denoise",
    "step",
    inputs=(
        TensorSpec("latent", "float32", ("samples", 8, 16, 24)),
        TensorSpec("carry", "float32", ("samples", 8, 16, 24), file_name="noise"),
        TensorSpec("timestep", "float32", ("samples",)),
        TensorSpec("row_token", "int32", ("rows",)),
        TensorSpec("tokens", "float16", ("conditions", 77, 5)),
    ),
    outputs=(
        TensorSpec("next_latent", "float32", ("samples", 8, 16, 24)),
        TensorSpec("epsilon", "float32", ("samples", 8, 16, 24)),
    ),
    banks=(BankSpec("tokens", ("tokens",), "row_token"),),
    per_step=("timestep", "row_token"),
    feedback={"latent": "next_latent", "carry": "epsilon"},
)
DECODER = GraphSpec(
    "decode",
    "decode",
    inputs=(TensorSpec("latent", "float32", (1, 8, 16, 24)),),
    outputs=(TensorSpec("image", "uint8", (1, 128, 192, 3)),),
)
MANIFEST_OF_TWO = Manifest(
    system="abacus",
    backend="onnxruntime",
    backend_version="1.2.3",
    target="any",
    precision="fp16",
    max_batch=3,
    dimensions={"samples": 1, "rows": 2, "conditions": 2},
    graphs={
        "denoise": GraphRecord(
            STEP,
            (
                FileRecord("denoise.onnx", 12, "aa" * 32),
                FileRecord("weights/denoise.data", 1 << 40, "bb" * 32),
            ),
            error={"epsilon": 1.5e-7},
            build_seconds=3.25,
            scratch_bytes={"onnxruntime": 1 << 33, "openvino": 7},
            variants={"cpu": FileRecord("denoise.cpu.onnx", 11, "ff" * 32)},
            made_from="ab" * 32,
        ),
        "decode": GraphRecord(DECODER, (FileRecord("decode.onnx", 34, "cc" * 32),)),
    },
    constants=FileRecord("constants.npz", 56, "dd" * 32),
    defaults={"guidance_scale": 2.0, "mode": "keep_background", "guidance_interval": [200, 999]},
    checkpoint={"file": "weights.safetensors", "sha256": "ee" * 32},
    architecture={"channels": [1, 2], "attention": [True, False]},
    schedule={"kind": "ddpm", "prediction": "epsilon"},
    producer="a test",
)


def read(folder: Path, content: Any) -> Manifest:
    (folder / MANIFEST).write_text(content if isinstance(content, str) else json.dumps(content))
    return read_manifest(folder / MANIFEST)


def refused(folder: Path, content: Any) -> str:
    with pytest.raises(BundleError) as caught:
        read(folder, content)
    sentence = str(caught.value)
    assert str(folder) in sentence
    assert "\n" not in sentence
    return sentence


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(MANIFEST_OF_TWO.to_json())
    change(content)
    return content


# --- writing and reading ----------------------------------------------------------------------------------


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    again = read(tmp_path, MANIFEST_OF_TWO.to_json())
    assert again == MANIFEST_OF_TWO
    assert again.to_json() == MANIFEST_OF_TWO.to_json()


def test_the_manifest_of_a_built_bundle_is_read_back(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(tiny_bundle / MANIFEST)
    assert read(tmp_path, manifest.to_json()) == manifest
    assert manifest.to_json() == (tiny_bundle / MANIFEST).read_text()


def test_the_file_says_what_the_documentation_says() -> None:
    content = json.loads(MANIFEST_OF_TWO.to_json())
    assert (content["format"], content["format_version"], content["producer"]) == (
        "anydoor-bundle",
        FORMAT_VERSION,
        "a test",
    )
    assert content["dimensions"] == {"samples": 1, "rows": 2, "conditions": 2}
    assert content["defaults"]["guidance_interval"] == [200, 999]
    graph = content["graphs"]["denoise"]
    assert graph["role"] == "step"
    assert graph["inputs"][0] == {"name": "latent", "dtype": "float32", "shape": ["samples", 8, 16, 24]}
    assert graph["inputs"][1]["file_name"] == "noise"
    assert graph["banks"] == [{"name": "tokens", "tensors": ["tokens"], "index": "row_token"}]
    assert graph["per_step"] == ["timestep", "row_token"]
    assert graph["feedback"] == {"latent": "next_latent", "carry": "epsilon"}
    assert graph["scratch_bytes"] == {"onnxruntime": 1 << 33, "openvino": 7}
    assert graph["files"][0] == {"path": "denoise.onnx", "bytes": 12, "sha256": "aa" * 32}
    assert graph["variants"] == {"cpu": {"path": "denoise.cpu.onnx", "bytes": 11, "sha256": "ff" * 32}}
    assert "spec" not in graph
    assert "tokenizer" not in content


def test_a_bundle_that_takes_prompts_says_how_they_are_read() -> None:
    tokenizer = TokenizerRecord(FileRecord("merges.txt", 3, "ee"), "!", ("<|endoftext|>",))
    content = json.loads(replace(MANIFEST_OF_TWO, tokenizer=tokenizer).to_json())
    assert content["tokenizer"] == {
        "merges": {"path": "merges.txt", "bytes": 3, "sha256": "ee"},
        "pad": "!",
        "any_case": ["<|endoftext|>"],
    }


names = st.text(min_size=1, max_size=8)
counts = st.integers(0, 1 << 60)
tensors = st.builds(
    TensorSpec,
    name=names,
    dtype=st.sampled_from(["float32", "float16", "int32", "uint8"]),
    shape=st.lists(st.one_of(st.integers(0, 4096), names), max_size=5).map(tuple),
    file_name=st.one_of(st.just(""), names),
)
tensor_tuples = st.lists(tensors, max_size=4).map(tuple)
name_tuples = st.lists(names, max_size=3).map(tuple)
banks = st.builds(BankSpec, names, name_tuples, names)
files = st.builds(FileRecord, st.from_regex(r"[a-z]{1,8}(/[a-z.]{1,3}z)?", fullmatch=True), counts, names)
values = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), names)
tables = st.dictionaries(names, st.one_of(values, st.lists(values, max_size=3)), max_size=4)


def records(name: str, role: str) -> st.SearchStrategy[GraphRecord]:
    return st.builds(
        GraphRecord,
        spec=st.builds(
            GraphSpec,
            name=st.just(name),
            role=st.just(role),
            inputs=tensor_tuples,
            outputs=tensor_tuples,
            banks=st.lists(banks, max_size=2).map(tuple),
            per_step=name_tuples,
            feedback=st.dictionaries(names, names, max_size=2),
        ),
        files=st.lists(files, min_size=1, max_size=2).map(tuple),
        error=st.dictionaries(names, st.floats(0, 1), max_size=2),
        build_seconds=st.floats(0, 1e6),
        scratch_bytes=st.dictionaries(names, counts, max_size=2),
        variants=st.dictionaries(names, files, max_size=1),
        made_from=st.sampled_from(["", "ab" * 32]),
    )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    others = draw(st.lists(st.sampled_from([role for role in ROLES if role not in ("step", "decode")])))
    roles = draw(st.permutations(["step", "decode", *others]))
    keys = draw(st.lists(names, min_size=len(roles), max_size=len(roles), unique=True))
    return Manifest(
        **{name: draw(names) for name in ("system", "backend", "backend_version", "target", "precision")},
        max_batch=draw(st.integers(1, 64)),
        dimensions=draw(st.dictionaries(names, st.integers(1, 100), max_size=4)),
        graphs={key: draw(records(key, role)) for key, role in zip(keys, roles)},
        constants=draw(files),
        tokenizer=draw(st.none() | st.builds(TokenizerRecord, files, names, name_tuples)),
        defaults=draw(tables),
        checkpoint=draw(tables),
        architecture=draw(tables),
        schedule=draw(tables),
        producer=draw(names),
    )


@settings(max_examples=30)
@given(manifests())
def test_any_manifest_is_read_back(manifest: Manifest) -> None:
    assert parse_manifest(json.loads(manifest.to_json())) == manifest


# --- what follows from it ---------------------------------------------------------------------------------


def test_sizes_shapes_and_roles() -> None:
    manifest = MANIFEST_OF_TWO
    assert manifest.typical_sizes == {"samples": 1, "rows": 2, "conditions": 2}
    assert manifest.largest_sizes == {"samples": 3, "rows": 6, "conditions": 6}
    assert manifest.latent_shape == (8, 16, 24)
    assert (manifest.picture_size, manifest.resolution) == ((128, 192), 128)
    assert manifest.size_text == "192x128 px"
    assert (manifest.step, manifest.decoder) == (STEP, DECODER)
    assert manifest.with_role("window") == []


def test_a_tensor_is_known_by_its_name_and_stored_under_another() -> None:
    carry = STEP.tensor("carry")
    assert (carry.name, carry.stored_name) == ("carry", "noise")
    assert STEP.tensor("latent").stored_name == "latent"
    assert carry.nbytes({"samples": 3}) == 3 * 8 * 16 * 24 * 4
    assert STEP.tensor("tokens").nbytes({"conditions": 2}) == 2 * 77 * 5 * 2


def test_sizes_of_a_call_follow_from_the_shapes_of_its_inputs() -> None:
    shapes = {
        tensor.name: tensor.resolve({"samples": 2, "rows": 3, "conditions": 4}) for tensor in STEP.inputs
    }
    assert STEP.sizes(shapes) == {"samples": 2, "rows": 3, "conditions": 4}


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [3, 99])
def test_a_newer_version(tmp_path: Path, version: int) -> None:
    sentence = refused(tmp_path, changed(lambda content: content.update(format_version=version)))
    assert f"has format version {version} and this runtime reads up to 2: upgrade anydoor-runtime" in sentence
    assert "rebuild the bundle with 'anydoor build CHECKPOINT'" in sentence


@pytest.mark.parametrize("version", [0, -1, None, "2", 1.5])
def test_a_version_that_never_was(tmp_path: Path, version: Any) -> None:
    sentence = refused(tmp_path, changed(lambda content: content.update(format_version=version)))
    assert f"has format version {version} " in sentence


def test_another_format(tmp_path: Path) -> None:
    for content in ({}, {"format": "abacus"}, [], 7, None):
        assert "does not say format 'anydoor-bundle'" in refused(tmp_path, content)


def test_no_json(tmp_path: Path) -> None:
    for content in ("", "{", '{"format":'):
        assert "manifest.json is not valid JSON" in refused(tmp_path, content)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(BundleError, match=r"is not a bundle: it has no manifest\.json"):
        read_manifest(tmp_path / MANIFEST)


GRAPH_FIELDS = ("role", "inputs", "outputs", "banks", "per_step", "feedback", "files", "scratch_bytes")


@pytest.mark.parametrize("field", GRAPH_FIELDS)
def test_a_graph_with_something_missing(tmp_path: Path, field: str) -> None:
    sentence = refused(tmp_path, changed(lambda content: content["graphs"]["denoise"].pop(field)))
    assert "is damaged: manifest.json cannot be used" in sentence
    assert f"'graphs.denoise.{field}' is missing" in sentence


@pytest.mark.parametrize("role", ["abacus", "", "Step", None, 7])
def test_a_role_that_there_is_not(tmp_path: Path, role: Any) -> None:
    sentence = refused(tmp_path, changed(lambda content: content["graphs"]["decode"].update(role=role)))
    assert "graphs.decode.role must be one of condition, scene, window, step, decode, segment" in sentence
    assert f"not {role!r}" in sentence


@pytest.mark.parametrize("role", ["step", "decode"])
def test_a_bundle_has_one_step_graph_and_one_decoder(tmp_path: Path, role: str) -> None:
    def twice(content: dict[str, Any]) -> None:
        graph = next(graph for graph in content["graphs"].values() if graph["role"] == role)
        content["graphs"]["another"] = copy.deepcopy(graph)

    def never(content: dict[str, Any]) -> None:
        graph = next(graph for graph in content["graphs"].values() if graph["role"] == role)
        graph["role"] = "condition"

    for change in (twice, never):
        assert f"one graph must have the role '{role}'" in refused(tmp_path, changed(change))


@pytest.mark.parametrize("path", ["../constants.npz", "/etc/passwd", "weights/../../x", ".."])
def test_a_path_that_leaves_the_bundle(tmp_path: Path, path: str) -> None:
    def constants(content: dict[str, Any]) -> None:
        content["constants"]["path"] = path

    def weights(content: dict[str, Any]) -> None:
        content["graphs"]["denoise"]["files"][1]["path"] = path

    for change in (constants, weights):
        assert f"path '{path}' leaves the bundle" in refused(tmp_path, changed(change))


def places(content: Any) -> list[tuple[str | int, ...]]:
    """The keys that lead to every value in it."""
    if not isinstance(content, dict | list):
        return []
    keys: list[Any] = list(content) if isinstance(content, dict) else list(range(len(content)))
    return [place for key in keys for place in [(key,), *((key, *rest) for rest in places(content[key]))]]


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**9), 10**9), st.floats(-1e9, 1e9), st.text(max_size=5)
)
JUNK = st.one_of(JUNK, st.lists(JUNK, max_size=2), st.dictionaries(st.text(max_size=3), JUNK, max_size=2))


@given(place=st.sampled_from(places(json.loads(MANIFEST_OF_TWO.to_json()))), junk=JUNK, drop=st.booleans())
def test_a_damaged_manifest_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, place: tuple[Any, ...], junk: Any, drop: bool
) -> None:
    def damage(content: Any) -> None:
        for key in place[:-1]:
            content = content[key]
        if drop:
            del content[place[-1]]
        else:
            content[place[-1]] = junk

    try:
        manifest = read(tmp_path_factory.getbasetemp(), changed(damage))
    except BundleError as error:
        assert "\n" not in str(error)  # noqa: PT017  either outcome may be right
        return
    assert read(tmp_path_factory.getbasetemp(), manifest.to_json()) == manifest


def test_parts_that_do_not_fit_together(tmp_path: Path) -> None:
    def without(content: dict[str, Any], name: str) -> None:
        step = next(graph for graph in content["graphs"].values() if graph["role"] == "step")
        step["inputs"] = [tensor for tensor in step["inputs"] if tensor["name"] != name]

    changes: dict[str, Callable[[dict[str, Any]], object]] = {
        "max_batch must be a whole number from 1 to 4096, not -1": lambda content: content.update(
            max_batch=-1
        ),
        "unknown dimension 'conditions'": lambda content: content["dimensions"].pop("conditions"),
        "no tensor 'latent'": lambda content: without(content, "latent"),
        "no tensor 'tokens'": lambda content: without(content, "tokens"),
        "no tensor 'timestep'": lambda content: without(content, "timestep"),
    }
    for sentence, change in changes.items():
        assert sentence in refused(tmp_path, changed(change))


@pytest.mark.parametrize("text", ['{"max_batch": Infinity', "[" * 100_000])
def test_text_that_is_no_manifest(tmp_path: Path, text: str) -> None:
    assert "not valid JSON" in refused(tmp_path, text)
