"""Golden parity: the drawn case that is shipped, and that the comparison notices what is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.parity import main
from benchmarks.support.golden import read_case

DRAWN = Path(__file__).parents[1] / "data" / "drawn.npz"

Capture = pytest.CaptureFixture[str]


def altered(
    path: Path, drop: tuple[str, ...] = (), **changes: np.ndarray[tuple[int, ...], np.dtype[np.generic]]
) -> Path:
    """A copy of the drawn case without some arrays and with others changed."""
    with np.load(DRAWN) as stored:
        arrays = {name: stored[name] for name in stored.files if not name.endswith(drop)}
    np.savez(path, **(arrays | changes))
    return path


SLOW = ("_latents", "_composite", "_eps_cond", "_eps_uncond", "_ctl_first8", "_decoded_crop")


def test_drawn_case_is_reproduced_from_pictures_to_picture(small_bundle: Path, capsys: Capture) -> None:
    """Every stage of both entry scripts, with the tolerances of the recordings."""
    assert main(["--bundle", str(small_bundle), str(DRAWN)]) == 0
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
        assert printed.count(stage) >= 2, stage
    for stage in ("composite, networks only", "composite, end to end", "unchanged, differing"):
        assert printed.count(stage) == 2, stage


def test_wrong_tokens_are_out_of_tolerance(small_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    with np.load(DRAWN) as stored:
        tokens = stored["box_tokens_ref"]
    case = altered(tmp_path / "wrong.npz", SLOW, box_tokens_ref=tokens * np.float32(1.001))
    assert main(["--bundle", str(small_bundle), str(case)]) == 1
    assert "1 out of tolerance: wrong box ID tokens" in capsys.readouterr().out


def test_wrong_crop_box_is_out_of_tolerance(small_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    case = altered(tmp_path / "wrong.npz", SLOW, box_tar_box_yyxx_crop=np.array([46, 300, 134, 389]))
    assert main(["--bundle", str(small_bundle), str(case)]) == 1
    assert "wrong box geometry: crop box" in capsys.readouterr().out


def test_values_that_are_not_numbers_are_out_of_tolerance(
    small_bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    case = altered(tmp_path / "wrong.npz", SLOW, box_tokens_zero=np.full((1, 257, 64), np.nan, np.float32))
    assert main(["--bundle", str(small_bundle), str(case)]) == 1
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
