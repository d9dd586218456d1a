"""The quality of composites: on the set whose truth is known, and by networks that judge likeness."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from benchmarks.fidelity import labelled_sheet, main
from benchmarks.support.baselines import copy_paste
from benchmarks.support.embeddings import load_clip, load_dino, pairwise_score
from benchmarks.support.fidelity_truth import EMPTY, GUESS, PASTE, PASTE_ON_GUESS, TRUTH, WRONG, measure
from benchmarks.support.patch_similarity import PatchSimilarity, load_dinov2, own_dinov2
from benchmarks.support.protocol import read_protocol
from engines.errors import AnyDoorError
from runtime.imaging.boxes import Box
from runtime.imaging.guess_background import guess_background
from runtime.imaging.reference import prepare_reference
from tests.support.imprint import tiny_imprint_bundle

Capture = pytest.CaptureFixture[str]

OURS = "AnyDoor"


def flat(value: int, height: int = 20, width: int = 24) -> np.ndarray:  # type: ignore[type-arg]
    return np.full((height, width, 3), value, np.uint8)


# baselines


def test_copy_paste_stretches_the_object_over_the_scene() -> None:
    picture, mask = flat(0, 30, 30), np.zeros((30, 30), np.uint8)
    picture[10:15, 10:20], mask[10:15, 10:20] = (10, 200, 30), 255
    mask[10, 10] = 0  # a corner that is not the object
    pasted = copy_paste(picture, mask, flat(90), Box(4, 2, 14, 12)).copy()
    assert np.array_equal(pasted[8, 10], (10, 200, 30))
    assert np.array_equal(pasted[2, 4], (90, 90, 90))
    pasted[2:12, 4:14] = 90
    assert np.array_equal(pasted, flat(90))


def test_the_background_is_guessed_from_what_surrounds_the_box() -> None:
    scene = flat(40)
    scene[:, 12:] = 200
    guessed = guess_background(scene, Box(9, 0, 15, 20))  # no colour above or below
    assert 40 < guessed[10, 9, 0] < guessed[10, 14, 0] < 200


# the set whose truth is known


@pytest.fixture(scope="module")
def patches(example_checkpoint: Path) -> PatchSimilarity:
    return own_dinov2(example_checkpoint)


@pytest.fixture(scope="module")
def perfect(patches: PatchSimilarity):  # type: ignore[no-untyped-def]
    return measure({OURS: lambda pair, number: pair.truth}, 2, patches, among=3)


def test_the_truth_is_perfect_and_the_baselines_are_not(perfect) -> None:  # type: ignore[no-untyped-def]
    rows = {row.method: row for row in perfect.rows()}
    assert rows[OURS].ssim == rows[TRUTH].ssim == pytest.approx(1.0)
    assert rows[TRUTH].retrieval["identity"] == 1.0
    assert rows[EMPTY].ssim < rows[PASTE].ssim < rows[PASTE_ON_GUESS].ssim < 1.0
    assert rows[EMPTY].psnr < rows[PASTE].psnr < rows[PASTE_ON_GUESS].psnr
    assert rows[EMPTY].ssim < rows[GUESS].ssim
    assert rows[PASTE].retrieval["identity"] > rows[EMPTY].retrieval["identity"]
    assert rows[WRONG].ssim is None
    assert rows[OURS].patches == rows[TRUTH].patches > rows[EMPTY].patches
    assert all(perfect.wins(OURS, method) == 1.0 for method in (EMPTY, GUESS, PASTE, PASTE_ON_GUESS))


def test_the_table_and_the_sheet_show_all_of_it(perfect) -> None:  # type: ignore[no-untyped-def]
    table = perfect.table()
    for method in (TRUTH, EMPTY, GUESS, PASTE, PASTE_ON_GUESS, WRONG, OURS):
        assert any(line.startswith(method) for line in table.splitlines())
    assert "2 pairs; each object is recognised among 3\npatches are described by own DINOv2" in table
    columns = perfect.columns()
    assert list(columns) == ["object", "scene", "copy-paste", OURS, "truth"]
    sheet = labelled_sheet(columns, rows=1)
    assert sheet.shape[1] == 5 * 160 + 4 * 6
    assert np.array_equal(sheet[-160:, -160:], perfect.pairs[0].truth)


def test_long_headings_of_a_sheet_take_more_lines() -> None:
    short = labelled_sheet({"AnyDoor": [flat(9)], "truth": [flat(9)]}, rows=1)
    long = labelled_sheet({"AnyDoor, refined from 200": [flat(9)], "truth": [flat(9)]}, rows=1)
    assert long.shape[1] == short.shape[1]
    assert long.shape[0] > short.shape[0]


@pytest.mark.slow
def test_the_command_measures_bundles_side_by_side(
    tiny_bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    bundles = ["--bundle", str(tiny_bundle), "--bundle", str(tiny_imprint_bundle())]
    arguments = [*bundles, "--count", "1", "--among", "2", "--steps", "1"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert "SSIM of IMPRINT is above 'copy-paste'" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    guidance = {name: settings["guidance_scale"] for name, settings in content["settings"].items()}
    assert guidance == {OURS: 5.0, "IMPRINT": 3.0}
    for model in guidance:
        assert len(content["scores"][model]) == len(content["objects"]) == 1
    assert [row["method"] for row in content["rows"][-2:]] == [OURS, "IMPRINT"]
    # networks that were never trained draw noise
    assert all(row["ssim"] < content["rows"][0]["ssim"] for row in content["rows"][-2:])
    assert (tmp_path / "out" / "pairs.png").is_file()


# masked patch similarity


def test_patches_are_compared_inside_the_masks_alone(patches: PatchSimilarity) -> None:
    """The object fills the middle of both pictures; around it one is black, the other noise."""
    rng = np.random.default_rng(0)
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 255
    drawn, other = rng.integers(0, 256, (2, 64, 64, 3), np.uint8)
    again = np.where(mask[..., None] > 0, drawn, 0).astype(np.uint8)
    assert patches(drawn, mask, again, mask) == pytest.approx(1.0, abs=1e-5)
    assert patches(other, mask, drawn, mask) < patches(drawn, mask, again, mask)
    sliver = np.zeros_like(mask)
    sliver[30, 10:60] = 255
    assert -1 <= patches(drawn, sliver, drawn, mask) <= 1


@torch.no_grad()
def test_patches_are_described_by_published_weights_where_they_are_given(tmp_path: Path) -> None:
    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=224)
    Dinov2Model(config).save_pretrained(tmp_path)
    write(tmp_path, {"image_processor_type": "BitImageProcessor"})
    patches, mask = load_dinov2(tmp_path), np.full((224, 224), 255, np.uint8)
    one, two = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    model = Dinov2Model.from_pretrained(tmp_path).eval()
    cut = np.stack([prepare_reference(each, mask, expand_ratio=1.0).image for each in (one, two)])
    seen = torch.from_numpy(((cut / 255 - mean) / std).transpose(0, 3, 1, 2)).float()
    ours, theirs = torch.nn.functional.normalize(model(seen).last_hidden_state[:, 1:], dim=-1)
    expected = float((ours @ theirs.T).max(dim=1).values.mean())
    assert patches(one, mask, two, mask) == pytest.approx(expected, abs=1e-4)
    assert patches.name == "DINOv2"


# networks that judge likeness, and the paper's protocol


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The smallest DINO and CLIP, as transformers stores them."""
    from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    seen = {"image_size": 32, "patch_size": 8}
    dino, clip = (tmp_path_factory.mktemp(name) for name in ("dino", "clip"))
    ViTModel(ViTConfig(**shape, **seen), add_pooling_layer=False).save_pretrained(dino)
    text = {**shape, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "projection_dim": 16}
    vision = {**shape, **seen, "projection_dim": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(clip)
    prepared = {"do_normalize": True, "do_resize": True, "resample": 3}
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    write(dino, {**prepared, **half, "feature_extractor_type": "ViTFeatureExtractor", "size": 32})
    write(
        clip,
        {
            **prepared,
            **half,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "size": 32,
            "do_center_crop": True,
            "crop_size": 32,
        },
    )
    return dino, clip


def write(folder: Path, content: dict[str, object]) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


def test_the_score_is_the_mean_cosine_over_all_pairs() -> None:
    generated = np.array([[1.0, 0.0], [0.6, 0.8]])
    real = np.array([[0.0, 1.0], [1.0, 0.0], [0.8, 0.6]])
    # 0, 1, 0.8 and 0.8, 0.6, 0.96
    assert pairwise_score(generated, real) == pytest.approx((0 + 1 + 0.8 + 0.8 + 0.6 + 0.96) / 6)


def test_embeddings_are_what_the_networks_say(networks: tuple[Path, Path]) -> None:
    """DINO's class token, CLIP's projected picture; here by hand, from pixels of the networks' own size."""
    from transformers import CLIPModel, ViTModel

    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        token = ViTModel.from_pretrained(networks[0], add_pooling_layer=False)(pixels).last_hidden_state[:, 0]
        model = CLIPModel.from_pretrained(networks[1])
        image = model.visual_projection(model.vision_model(pixels).pooler_output)
    for embedder, vectors in ((load_dino(networks[0]), token), (load_clip(networks[1]), image)):
        expected = torch.nn.functional.normalize(vectors, dim=-1).numpy()
        np.testing.assert_allclose(embedder(list(pictures)), expected, atol=1e-5)


def test_other_folders_are_refused(networks: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(AnyDoorError, match=r"is not a DINO folder: there is no config\.json"):
        load_dino(tmp_path)
    with pytest.raises(AnyDoorError, match="holds a model of the type 'clip'; DINO is a 'vit'"):
        load_dino(networks[1])
    (tmp_path / "config.json").write_text((networks[1] / "config.json").read_text())
    with pytest.raises(AnyDoorError, match="cannot read CLIP from"):
        load_clip(tmp_path)


def test_weights_that_are_not_there_are_not_made_up(networks: tuple[Path, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in networks[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("embeddings.cls_token")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(AnyDoorError, match=r"lack embeddings\.cls_token"):
        load_dino(tmp_path)


@pytest.fixture
def testset(tmp_path: Path) -> Path:
    """Two objects, one with two pictures, and two scenes."""
    rng = np.random.default_rng(0)
    for name in ("cup/00", "cup/01", "dog/00"):
        picture = rng.integers(0, 256, (30, 40, 4), np.uint8)
        picture[..., 3] = 0
        picture[5:25, 10:30, 3] = 255
        save(picture, tmp_path / f"objects/{name}.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[20:44, 16:40] = 255
    for name, suffix in (("1", "png"), ("2", "jpg")):
        save(rng.integers(0, 256, (64, 64, 3), np.uint8), tmp_path / f"scenes/{name}_GT.{suffix}")
        save(mask, tmp_path / f"scenes/{name}_mask.png")
    return tmp_path


def save(array: np.ndarray, path: Path) -> None:  # type: ignore[type-arg]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def test_a_test_set_is_read_as_it_was_released(testset: Path) -> None:
    objects, scenes = read_protocol(testset)
    assert [(each.name, len(each.files)) for each in objects] == [("cup", 2), ("dog", 1)]
    assert [picture.shape for picture in objects[0].real_pictures()] == [(20, 20, 3)] * 2
    assert [(scene.name, scene.read()[1]) for scene in scenes] == [
        ("1", Box(16, 20, 40, 44)),
        ("2", Box(16, 20, 40, 44)),
    ]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("objects/cup/00.png", "has no transparency"),
        ("scenes/1_mask.png", "1_mask.png' is empty"),
        ("scenes/2_mask.png", "is not as large as its scene"),
        ("scenes/2_GT.jpg", "there is no scene"),
    ],
)
def test_a_damaged_test_set_is_refused(testset: Path, damage: str, says: str) -> None:
    if damage.endswith("jpg"):
        (testset / damage).unlink()
    else:
        side = 32 if damage.startswith("scenes/2") else 64
        save(np.full((side, side, 3), 255 * (side == 32), np.uint8), testset / damage)
    with pytest.raises(AnyDoorError, match=says):
        read_everything(testset)


def read_everything(testset: Path) -> None:
    objects, scenes = read_protocol(testset)
    for each in objects:
        each.real_pictures()
    for scene in scenes:
        scene.read()


def test_the_command_scores_the_protocol(
    tiny_bundle: Path, testset: Path, networks: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    arguments = ["--bundle", str(tiny_bundle), "--protocol", str(testset), "--steps", "1"]
    folders = ["--dino", str(networks[0]), "--clip", str(networks[1])]
    assert main([*arguments, *folders, "--output", str(tmp_path / "out")]) == 0
    assert "DINO-score   CLIP-score" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "fidelity.json").read_text())

    # copy-paste by hand: the object fills its place, so that what is generated is the cut-out, resized
    dino = load_dino(networks[0])
    objects, _ = read_protocol(testset)
    expected = []
    for each in objects:
        cutout = Image.fromarray(each.reference[0][5:25, 10:30]).resize((24, 24), Image.Resampling.BILINEAR)
        vector = dino([np.asarray(cutout)])[0]
        expected.append(np.mean([vector @ real for real in dino(each.real_pictures())]))
    rows = {row["method"]: row["scores"] for row in content["rows"]}
    assert rows["copy-paste"]["DINO"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert list(rows) == ["scene as it is", "empty box", "copy-paste", OURS]
    assert content["objects"][OURS]["CLIP"].keys() == {"cup", "dog"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--protocol", "x"], "--protocol needs --dino FOLDER"),
        (["--dino", "x"], "give its folder with --protocol"),
        (["--count", "0"], "at least 1"),
        (["--bundle", "nowhere"], "nowhere"),
        (["--bundle", "a", "--bundle", "b", "--protocol", "x", "--dino", "y"], "measures one bundle"),
        (["--dinov2", "nowhere", "--count", "1"], "'nowhere' is not a DINOv2 folder"),
    ],
)
def test_what_cannot_be_measured_is_told(arguments: list[str], says: str, capsys: Capture) -> None:
    assert main(arguments) == 2
    assert says in capsys.readouterr().err
