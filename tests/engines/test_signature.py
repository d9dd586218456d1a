"""Signed bundles: what the owner of a key signed is loaded, and nothing else is."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from engines.bundle import Bundle
from engines.errors import BundleError
from engines.options import EngineOptions
from engines.signature import NEW_KEY, PUBLIC_KEY, SIGNATURE
from engines.verified import FileState
from runtime import Compositor
from runtime.cli import main
from runtime.server.serve import open_models
from runtime.server.settings import Settings
from tests.support.anydoor import DENOISE
from tests.support.stable_diffusion import tiny_stable_diffusion_bundle

pytest.importorskip("cryptography", reason="needs pip install '.[sign]'")

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A folder with a pair of keys, made with the commands that the documentation names."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    for command in (NEW_KEY, PUBLIC_KEY):
        subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


@pytest.fixture
def signed(tiny_bundle: Path, keys: Path) -> Path:
    """A signed copy of a bundle."""
    bundle = Path(shutil.copytree(tiny_bundle, keys / "bundle"))
    assert main(["sign", str(bundle), "--key", str(keys / "private.pem")]) == 0
    return bundle


def test_a_signed_bundle_is_loaded(signed: Path, keys: Path) -> None:
    options = EngineOptions(device="cpu")
    for load in (Compositor.load(signed, options, trusted_key=keys / "public.pem"), Compositor.load(signed)):
        assert load.system


def test_openssl_checks_the_signature(signed: Path, keys: Path) -> None:
    where = ["-inkey", str(keys / "public.pem"), "-sigfile", str(signed / SIGNATURE)]
    command = ["openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-in", str(signed / "manifest.json")]
    result = subprocess.run([*command, *where], capture_output=True, text=True, check=True)
    assert "Verified Successfully" in result.stdout


def test_a_changed_manifest_is_refused(signed: Path, keys: Path) -> None:
    """A bundle whose weights and hashes both were changed is sound, but not signed."""
    manifest = signed / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"max_batch": 4', '"max_batch": 2'))
    Bundle.open(signed).verify_all()
    with pytest.raises(
        BundleError, match=r"is not signed by the owner of .*public\.pem', or was changed since"
    ):
        Bundle.open(signed, keys / "public.pem")


def test_files_are_read_whatever_was_found_before(signed: Path, keys: Path) -> None:
    weights = signed / "denoise.onnx.data"
    record = Bundle.open(signed).manifest.graphs[DENOISE].files[1]
    weights.write_bytes(bytes(record.bytes))
    FileState.of(weights, record.sha256).remember()
    Bundle.open(signed).verify(DENOISE)
    with pytest.raises(BundleError, match=r"denoise\.onnx\.data is not the file that was built"):
        Bundle.open(signed, keys / "public.pem").verify(DENOISE)


def test_a_bundle_without_a_signature_is_refused(tiny_bundle: Path, keys: Path, capfd: Capture) -> None:
    with pytest.raises(
        BundleError, match="is not signed, and a signature is required: sign it with 'anydoor"
    ):
        Bundle.open(tiny_bundle, keys / "public.pem")
    command = ["serve", "--bundle", str(tiny_bundle), "--require-signature"]
    assert main([*command, "--trusted-key", str(keys / "public.pem")]) == 2
    assert "is not signed" in capfd.readouterr().err
    assert main(command) == 2
    assert "require_signature and trusted_key must be given together" in capfd.readouterr().err


def test_the_key_of_somebody_else_is_refused(signed: Path, keys: Path) -> None:
    other = keys / "other"
    other.mkdir()
    for command in (NEW_KEY, PUBLIC_KEY):
        subprocess.run(command.split(), cwd=other, check=True, capture_output=True)
    with pytest.raises(BundleError, match="is not signed by the owner of"):
        Bundle.open(signed, other / "public.pem")


def test_doctor_says_who_signed(signed: Path, keys: Path, capsys: Capture) -> None:
    command = ["doctor", str(signed), "--backend", "onnxruntime", "--trusted-key", str(keys / "public.pem")]
    assert main(command) == 0
    assert f"sound; signed by the owner of {keys / 'public.pem'}" in capsys.readouterr().out
    (signed / SIGNATURE).write_bytes(bytes(64))
    assert main(command) == 2
    assert "unusable: the bundle at" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["none.pem", "public.pem", "rsa.pem", "locked.pem", "bundle"])
def test_a_key_that_cannot_sign_is_refused(signed: Path, keys: Path, key: str, capsys: Capture) -> None:
    rsa = "openssl genpkey -algorithm rsa -pkeyopt rsa_keygen_bits:1024 -out rsa.pem"
    locked = "openssl pkey -in private.pem -aes256 -passout pass:word -out locked.pem"
    for command in (rsa, locked):
        subprocess.run(command.split(), cwd=keys, check=True, capture_output=True)
    before = (signed / SIGNATURE).read_bytes()
    assert main(["sign", str(signed), "--key", str(keys / key)]) == 2
    said = capsys.readouterr().err
    assert key in said
    assert said.count("\n") == 1
    assert (signed / SIGNATURE).read_bytes() == before


@pytest.mark.parametrize("key", ["none.pem", "private.pem", "bundle"])
def test_a_key_that_cannot_be_trusted_is_refused(signed: Path, keys: Path, key: str) -> None:
    with pytest.raises(BundleError, match=key):
        Bundle.open(signed, keys / key)


def test_a_bundle_that_is_not_sound_is_not_signed(signed: Path, keys: Path, capsys: Capture) -> None:
    (signed / SIGNATURE).unlink()
    content = bytearray((signed / "decode.onnx.data").read_bytes())
    content[0] ^= 1
    (signed / "decode.onnx.data").write_bytes(content)
    assert main(["sign", str(signed), "--key", str(keys / "private.pem")]) == 2
    assert "decode.onnx.data is not the file that was built" in capsys.readouterr().err
    assert not (signed / SIGNATURE).exists()


def test_every_bundle_of_a_server_must_be_signed(
    signed: Path, keys: Path, tiny_bundle: Path, segmenter_bundles: tuple[Path, Path]
) -> None:
    common = Settings(
        bundle=(f"cup={signed}", f"bear={tiny_bundle}"),
        require_signature=True,
        trusted_key=str(keys / "public.pem"),
        engine=EngineOptions("onnxruntime", "cpu"),
    )
    _, _, bundles = open_models(common)
    with pytest.raises(BundleError, match="is not signed"):
        bundles.load(bundles.open("bear"))
    filler, segmenter = str(tiny_stable_diffusion_bundle(9)), (str(segmenter_bundles[0]),)
    for changed in (replace(common, filler=filler), replace(common, segmenter=segmenter)):
        with pytest.raises(BundleError, match="is not signed"):
            open_models(changed)
