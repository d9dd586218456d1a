"""A build replaces a bundle, and never anything else; what it makes can be opened."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from engines.bundle import REST
from engines.errors import AnyDoorError
from engines.files import partial_path
from engines.manifest import MANIFEST, Manifest, read_manifest
from engines.signature import SIGNATURE
from export.build import _build_beside
from export.build_engines import checkpoint_name, main, plans_folder
from export.noise import RECIPE
from export.output import check_output
from export.progress import Progress
from export.systems.system import checkpoint_record
from tests.support.format_1 import OLD_BUNDLE

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of a bundle to write into."""
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def refusal(output: Path, *inputs: Path) -> str:
    with pytest.raises(AnyDoorError) as error:
        check_output(output, inputs)
    return str(error.value)


# --- what is in the folder --------------------------------------------------------------------------------


def test_a_page_with_a_manifest_is_no_bundle(tiny_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    app = tmp_path / "app"
    (app / "src").mkdir(parents=True)
    (app / "index.html").write_text("<html>")
    (app / MANIFEST).write_text('{"name": "app", "display": "standalone"}')
    assert main([str(tiny_checkpoint), "--output", str(app), "--quiet"]) == 2
    assert f"'{app}' is a directory with other things in it" in capsys.readouterr().err
    assert (app / "index.html").read_text() == "<html>"


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"format": "another"}', "\0"])
def test_manifests_of_something_else(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    assert "is a directory with other things in it" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["notes.txt", "sks-cup.safetensors", ".notes", "denoise.plan"])
def test_a_file_beside_a_bundles_own_is_not_lost(bundle: Path, name: str) -> None:
    (bundle / name).write_text("three years of work")
    assert refusal(bundle) == (
        f"the file '{name}' in '{bundle}' is no part of the bundle there and would be lost: move it away, or "
        "give another --output"
    )


def test_a_folder_in_a_bundle_is_not_lost(bundle: Path) -> None:
    (bundle / "tokenizer").mkdir()
    assert f"the folder 'tokenizer' in '{bundle}' is no part of the bundle" in refusal(bundle)


def test_what_builds_and_other_commands_write_into_a_bundle_may_be_there(bundle: Path) -> None:
    for name in (SIGNATURE, REST, RECIPE, partial_path(bundle / REST).name):
        (bundle / name).touch()
    (bundle / "denoise.onnx").unlink()  # as in a skeleton
    check_output(bundle)


def test_bundles_that_cannot_be_opened_are_built_again(bundle: Path, tmp_path: Path) -> None:
    content = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps(content | {"max_batch": 5000}))
    check_output(bundle)
    (bundle / MANIFEST).write_text(json.dumps(content | {"format_version": 99}))
    check_output(bundle)


def test_a_bundle_of_the_older_format_is_replaced(tmp_path: Path) -> None:
    check_output(shutil.copytree(OLD_BUNDLE, tmp_path / "old"))


def test_a_folder_that_is_empty_or_not_there(tmp_path: Path) -> None:
    check_output(tmp_path)
    check_output(tmp_path / "new")


# --- where the folder is ----------------------------------------------------------------------------------


def test_what_a_bundle_is_built_from_is_not_in_it(bundle: Path) -> None:
    link = bundle.with_name("link.onnx")
    link.symlink_to(bundle / "denoise.onnx")
    assert refusal(bundle, link) == (
        f"'{link}', which is built from, lies in '{bundle}': give another --output"
    )
    assert "is the folder to build from" in refusal(bundle, bundle / "..", bundle / "." / "")
    check_output(bundle, [bundle.with_name("bundle.safetensors")])


def test_a_mount_point_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    assert refusal(tmp_path) == (
        f"'{tmp_path}' is a mount point, which cannot be replaced: give a folder in it"
    )
    check_output(tmp_path / "bundle")


def test_the_current_folder_is_not_replaced(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle)
    sentence = "is the folder that you are in, which a build would replace: give another --output"
    assert refusal(Path()) == f"'.' {sentence}"
    assert refusal(bundle) == f"'{bundle}' {sentence}"


@pytest.mark.parametrize("folder", ["model-v1.5", "model.safetensors"])
def test_a_folders_bundle_has_its_whole_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    (tmp_path / folder / "unet").mkdir(parents=True)
    assert checkpoint_name(tmp_path / folder) == folder
    monkeypatch.chdir(tmp_path / folder)
    assert checkpoint_name(Path()) == folder
    assert checkpoint_name(Path("unet/..")) == folder
    monkeypatch.chdir("unet")
    assert checkpoint_name(Path("..")) == folder


def test_a_files_bundle_has_its_name_without_the_last_suffix(tmp_path: Path) -> None:
    assert checkpoint_name(Path("model-v1.5.safetensors")) == "model-v1.5"
    assert checkpoint_name(tmp_path / "a.safetensors.index.json") == tmp_path.name
    (tmp_path / "latest.ckpt").symlink_to("4711")
    assert checkpoint_name(tmp_path / "latest.ckpt") == "latest"
    with pytest.raises(AnyDoorError, match="'/' has no name to call the bundle by: give --output"):
        checkpoint_name(Path("/"))


def test_plans_go_beside_their_bundle(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(bundle)
    assert plans_folder(Path(), "tensorrt") == bundle.with_name("bundle-tensorrt")
    assert plans_folder(Path("../bundle"), "tensorrt") == Path("../bundle-tensorrt")
    for arguments, sentence in (
        (["."], "'.' is a bundle already: give a checkpoint, or a --backend to build plans for"),
        ([".", "--output", "."], "'.' is the folder to build from: give another --output"),
    ):
        assert main([*arguments, "--backend", "onnxruntime"]) == 2
        assert sentence in capsys.readouterr().err


# --- what is put there ------------------------------------------------------------------------------------


def test_a_bundle_that_could_not_be_opened_replaces_none(bundle: Path) -> None:
    """Whatever the options let through."""
    before = (bundle / MANIFEST).read_bytes()
    manifest = read_manifest(bundle / MANIFEST)

    def build(folder: Path, progress: Progress) -> Manifest:
        return replace(manifest, checkpoint={"file": "a\u00a0b.ckpt"})

    with pytest.raises(AnyDoorError) as error:
        _build_beside(bundle, build, Progress(quiet=True))
    assert str(error.value) == (
        "what was built could not be opened, so nothing was written (checkpoint.file must be printable text, "
        "not 'a\\xa0b.ckpt')"
    )
    assert (bundle / MANIFEST).read_bytes() == before
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("name", ["a\u00a0b.ckpt", "a\nb.ckpt", "a\udcffb.ckpt"])
def test_names_that_cannot_be_shown_are_recorded_without_that(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert checkpoint_record(tmp_path / name)["file"] == "a?b.ckpt"
    assert checkpoint_record(tmp_path, [tmp_path / name])["file"] == tmp_path.name
