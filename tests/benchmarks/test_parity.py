"""Golden parity: the drawn case that is shipped, and that the comparison notices what is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.parity import main
from benchmarks.support.comparison import Networks
from benchmarks.support.golden import read_case
from engines.options import EngineOptions
from runtime import Compositor

DRAWN = Path(__file__).parents[1] / "data" / "drawn.npz"

Capture = pytest.CaptureFixture[str]


def altered(
    path: Path, drop: tuple[str, ...] = (), **changes: np.ndarray[tuple[int, ...], np.dtype[np.generic]]
) -> Path:
    """A copy of the first run of the drawn case without some arrays and with others changed."""
    with np.load(DRAWN) as stored:
        names = [name for name in stored.files if not name.startswith("shape_") and not name.endswith(drop)]
        arrays = {name: stored[name] for name in names}
    np.savez(path, **(arrays | changes))
    return path


@pytest.fixture(params=["modules", pytest.param("bundle", marks=pytest.mark.nightly)])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The network of the golden cases: PyTorch's modules, and nightly what is exported of them."""
    if request.param == "bundle":
        bundle: Path = request.getfixturevalue("small_bundle")
        return bundle
    compositor: Compositor = request.getfixturevalue("small_modules")
    monkeypatch.setattr(Compositor, "load", lambda *_: compositor)
    return compositor.bundle.path


SLOW = ("_latents", "_composite", "_eps_cond", "_eps_uncond", "_ctl_first8", "_decoded_crop")


def assert_reproduced(small: Path, case: Path, runs: int, capsys: Capture) -> None:
    """Every stage of a case, with the tolerances of the recordings."""
    assert main(["--bundle", str(small), str(case)]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith("parity: 1 cases, ")
    assert "all within tolerance (worst drawn " in printed.splitlines()[-1]
    for stage in (
        "geometry: crop box",
        "hint: mean",
        "ID tokens",
        "eps_uncond",
        "latents, step 5/5",
        "decoded_crop",
    ):
        assert printed.count(stage) >= runs, stage
    for stage in ("composite, networks only", "composite, end to end", "unchanged, differing"):
        assert printed.count(stage) == runs, stage


def test_the_drawn_case_is_reproduced_from_pictures_to_picture(
    small: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert_reproduced(small, altered(tmp_path / "drawn.npz"), 1, capsys)


@pytest.mark.nightly
def test_both_entry_scripts_are_reproduced(small_bundle: Path, capsys: Capture) -> None:
    assert_reproduced(small_bundle, DRAWN, 2, capsys)


def first_detail_maps(bundle: Path) -> list[np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    """The detail maps of the first run's first step, as we compute them."""
    run = read_case(DRAWN)[0]
    networks = Networks(run, Compositor.load(bundle, EngineOptions(backend="onnxruntime")), lambda: None)
    maps = networks._first_detail_maps(networks.id_tokens())
    return [tensor[:1] for tensor in maps.values()]


def test_detail_maps_are_compared_by_their_number(small: Path, tmp_path: Path, capsys: Capture) -> None:
    """A case may lack some of them."""
    maps = first_detail_maps(small)
    recorded = {f"box_ctl{number:02d}": maps[number] for number in (0, 11, 12)}
    case = altered(tmp_path / "some.npz", SLOW, **recorded)
    options = ["--bundle", str(small), "--backend", "onnxruntime"]
    assert main([*options, str(case)]) == 0
    printed = capsys.readouterr().out
    assert [n for n in range(13) if f"detail map {n} " in printed] == [0, 11, 12]
    assert main([*options, str(altered(tmp_path / "wrong.npz", SLOW, box_ctl11=-maps[11]))]) == 1
    assert main([*options, str(altered(tmp_path / "many.npz", SLOW, box_ctl13=maps[12]))]) == 2
    assert "has a detail map 13, and this network makes 13" in capsys.readouterr().err


def test_wrong_tokens_are_out_of_tolerance(small: Path, tmp_path: Path, capsys: Capture) -> None:
    with np.load(DRAWN) as stored:
        tokens = stored["box_tokens_ref"]
    case = altered(tmp_path / "wrong.npz", SLOW, box_tokens_ref=tokens * np.float32(1.001))
    assert main(["--bundle", str(small), str(case)]) == 1
    assert "1 out of tolerance: wrong box ID tokens" in capsys.readouterr().out


def test_wrong_crop_box_is_out_of_tolerance(small: Path, tmp_path: Path, capsys: Capture) -> None:
    case = altered(tmp_path / "wrong.npz", SLOW, box_tar_box_yyxx_crop=np.array([46, 300, 134, 389]))
    assert main(["--bundle", str(small), str(case)]) == 1
    assert "wrong box geometry: crop box" in capsys.readouterr().out


def test_values_that_are_not_numbers_are_out_of_tolerance(
    small: Path, tmp_path: Path, capsys: Capture
) -> None:
    case = altered(tmp_path / "wrong.npz", SLOW, box_tokens_zero=np.full((1, 257, 64), np.nan, np.float32))
    assert main(["--bundle", str(small), str(case)]) == 1
    assert "ID tokens, black" in capsys.readouterr().out.splitlines()[-1]


def test_case_without_pictures_takes_them_from_another(tmp_path: Path) -> None:
    pictures = (
        "ref_image",
        "ref_mask",
        "tar_image",
        "tar_mask",
        "_ref",
        "_hint_rgb",
        "_hint_mask",
        "_ratios",
    )
    run = read_case(altered(tmp_path / "bare.npz", pictures), donor=DRAWN)[0]
    whole = read_case(DRAWN)[0]
    np.testing.assert_array_equal(run.arrays["tar_image"], whole.arrays["tar_image"])
    assert run.ratios == whole.ratios


def test_case_without_pictures_and_nobody_to_lend_them(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    case = altered(tmp_path / "bare.npz", ("ref_image",))
    assert main(["--bundle", str(tmp_path), str(case)]) == 2
    assert "--inputs CASE0.npz" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"no archive"])
def test_file_that_is_no_case(tmp_path: Path, capsys: Capture, content: bytes) -> None:
    (tmp_path / "case.npz").write_bytes(content)
    assert main(["--bundle", str(tmp_path), str(tmp_path / "case.npz")]) == 2
    assert "a .npz file is expected" in capsys.readouterr().err


def test_missing_checkpoint(tmp_path: Path, capsys: Capture) -> None:
    assert main(["--checkpoint", str(tmp_path / "none.safetensors"), str(DRAWN)]) == 2
    assert "there is no checkpoint at" in capsys.readouterr().err
