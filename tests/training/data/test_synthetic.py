"""The renderer: the same number gives the same picture, masks are exact, objects stand apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.rendering import count_operators
from training.data.synthetic import (
    ObjectSpec,
    Pose,
    bodies,
    make_light,
    make_object,
    make_scene,
    render,
    render_all,
    render_background,
    render_cutout,
)
from training.data.synthetic.__main__ import draw_sheet, main
from training.data.synthetic.catalogue import CATALOGUE
from training.data.synthetic.rendering import frame_of, place, render_frames
from training.data.synthetic.shapes import (
    Solid,
    box,
    carve,
    cylinder,
    ellipsoid,
    join,
    several,
    sphere,
    torus,
)
from training.data.synthetic.views import (
    draw_frames,
    reference_frame,
    reference_view,
    scene_frame,
    scene_view,
)

SIZE = (64, 48)
FRAMES = (scene_frame, reference_frame)


def test_the_same_number_gives_the_same_picture() -> None:
    first = scene_view(5, 1, 48)
    make_object.cache_clear()
    second = scene_view(5, 1, 48)
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.mask, second.mask)


@pytest.mark.parametrize("view", [0, 1], ids=["in a scene", "alone"])
def test_the_pictures_are_those_of_the_truth_set(view: int) -> None:
    """Parts of held-out views of every kind of object, as they were first drawn.

    Where a normal lies between two faces of an object, its last bit chooses the face, and where a ray grazes
    the object, whether it hits: 93 of the 3,072,000 pixels of 120 views differ by more than a level.
    """
    recorded = np.load(Path(__file__).parents[2] / "data" / "views.npz")
    frame = FRAMES[view]
    drawn = draw_frames([frame(int(seed), 0) for seed in recorded["seeds"]]).numpy()
    for picture, (left, top), crop in zip(
        drawn, recorded["places"][:, view], recorded["crops"][:, view], strict=True
    ):
        side = len(crop)
        seen = picture[top : top + side, left : left + side]
        assert (np.abs(seen.astype(int) - crop).max(-1) > 1).sum() <= 2


def test_other_numbers_give_other_pictures() -> None:
    views = [scene_view(seed, number, 32).image for seed in range(4) for number in range(3)]
    assert len({view.tobytes() for view in views}) == len(views)


def test_the_mask_is_where_a_ray_hits() -> None:
    """One ray through each of a pixel's four sample points, marched slowly and without any shortcut."""
    scene, spec, pose = make_scene(3), make_object(7), Pose(0.2, 0.1, 0.5, 1.2)
    _, mask = render(scene, spec, pose, SIZE)
    body = place([spec], [pose])
    half_pixels = torch.arange(2 * SIZE[1] * 2 * SIZE[0])
    columns, rows = half_pixels % (2 * SIZE[0]) / 2 + 0.25, half_pixels // (2 * SIZE[0]) / 2 + 0.25
    rays = scene.camera.rays(columns, rows, SIZE)
    depth, hit = torch.full((rays.shape[1],), 2.0), torch.zeros(rays.shape[1], dtype=torch.bool)
    for _ in range(400):
        gap = body.shape.distance(body.inside(scene.camera.eye + rays * depth)) * pose.scale
        hit |= gap < 0.004 * pose.scale
        depth = (depth + (0.6 * gap).clamp(min=0.001)).clamp(max=20)
    share = hit.numpy().reshape(SIZE[1], 2, SIZE[0], 2).mean((1, 3)) * 255
    # rays that graze the surface for long may end differently: a sample here and there, never a pixel's worth
    assert np.abs(share - mask).max() <= 128
    assert (np.abs(share - mask) > 1).mean() < 0.01


def test_nothing_changes_far_from_the_object() -> None:
    scene = make_scene(11)
    image, mask = render(scene, make_object(2), Pose(scale=0.4), SIZE)
    empty = render_background(scene, SIZE)
    assert np.array_equal(image[:6], empty[:6])
    assert not np.array_equal(image[mask > 128], empty[mask > 128])


def test_the_object_casts_a_shadow() -> None:
    scene = make_scene(4)
    image, mask = render(scene, make_object(9), Pose(scale=1.0), SIZE)
    empty = render_background(scene, SIZE)
    outside = mask == 0
    assert (image[outside].astype(int) <= empty[outside].astype(int) + 1).all()
    assert (image[outside].astype(int) < empty[outside].astype(int) - 10).any()


def test_the_near_object_hides_the_far_one() -> None:
    scene, spec = make_scene(1), make_object(3)
    alone = render(scene, spec, Pose(z=-0.6), SIZE)[1]
    _, masks = render_all(scene, [(spec, Pose(z=-0.6)), (spec, Pose(z=0.8, scale=1.2))], SIZE)
    assert (masks[0] <= alone).all()
    assert masks[0].sum() < alone.sum()
    assert (masks[0].astype(int) + masks[1] <= 256).all()


def test_twins_are_joined_like_any_other_two() -> None:
    """Two balls are computed abreast, a ball and an equal ellipsoid one after the other."""
    points = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (3, 500)).astype(np.float32))
    left, right = (-0.2, 0.0, 0.0), (0.2, 0.0, 0.0)
    twins = join(sphere(left, 0.3), sphere(right, 0.3), 0.1)
    others = join(sphere(left, 0.3), ellipsoid(right, (0.3, 0.3, 0.3)), 0.1)
    assert type(twins) is not type(others)
    assert torch.allclose(twins.distance(points), others.distance(points), atol=1e-6)


def test_an_object_beside_the_picture_is_not_seen() -> None:
    scene = make_scene(2)
    picture, mask = render(scene, make_object(3), Pose(x=60), SIZE)
    assert not mask.any()
    assert np.array_equal(picture, render_background(scene, SIZE))


def test_many_pictures_at_once_are_those_of_one_after_the_other() -> None:
    """In rooms and alone, of objects of several kinds, two of them in one picture, two views of one."""
    keys = [(seed, number) for seed in (2, 7, 12, 22, 30) for number in range(2)]
    frames = [frame(*key) for key in keys for frame in FRAMES]
    alone, together = (draw_frames(frames, 40, at_once=at_once).int() for at_once in (1, 20))
    assert ((alone - together).abs() > 1).float().mean() < 1e-4


def two_balls() -> list[tuple[ObjectSpec, Pose]]:
    """Objects of one kind, the second one beside the first and before it."""
    balls = [spec for spec in map(make_object, range(100)) if spec.shape.name == "ball"]
    return list(zip(balls[:2], (Pose(-0.3, -0.4), Pose(0.5, 0.2)), strict=True))


def test_objects_of_one_kind_may_share_a_picture() -> None:
    """They are traced together; each hides what is behind it, and both take light from the floor."""
    scene = make_scene(1)
    picture, masks = render_all(scene, two_balls(), SIZE)
    pictures = [render(scene, spec, pose, SIZE) for spec, pose in two_balls()]
    for (alone, whole), mask in zip(pictures, masks, strict=True):
        assert (np.abs(picture.astype(int) - alone)[mask == 255] <= 1).all()
        assert (mask <= whole).all()
    assert np.array_equal(masks[1], pictures[1][1])
    floor = (masks[0] == 0) & (masks[1] == 0)
    assert (picture <= np.minimum(pictures[0][0], pictures[1][0]))[floor].all()


def test_a_second_object_of_a_kind_takes_hardly_more_operators() -> None:
    """A card launches a kernel for each, so that it must not matter in how many pictures a kind is."""
    balls = two_balls()
    one = count_operators(lambda: render_all(make_scene(1), balls[:1], SIZE))
    two = count_operators(lambda: render_all(make_scene(1), balls, SIZE))
    four = count_operators(lambda: render_frames([frame_of(make_scene(1), balls)] * 2, SIZE, at_once=2))
    assert one < two < 1.5 * one
    assert four < 1.05 * two


def test_everything_is_drawn_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device holds shapes alone, and refuses to compute with a tensor of another device."""
    monkeypatch.setattr("torch.fx.experimental._config.meta_nonzero_assume_all_nonzero", True)
    monkeypatch.setattr(bodies, "SORTED", (1, 2))
    frames, meta = [frame(seed, 0) for seed in (2, 12, 22) for frame in FRAMES], torch.device("meta")
    views = draw_frames(frames, 24, meta, at_once=6)
    assert views.device == meta
    assert views.shape == (6, 24, 24, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
def test_a_card_draws_the_same_pictures() -> None:
    """Except where the last bit of a distance decides what a ray hits; twice the same, bit for bit."""
    frames = [frame(seed, 0) for seed in range(40) for frame in FRAMES]
    here, there, again = (draw_frames(frames, device=torch.device(name)) for name in ("cpu", "cuda", "cuda"))
    assert ((here.int() - there.cpu().int()).abs() > 1).float().mean() < 1e-3
    assert torch.equal(there, again)


@pytest.mark.parametrize("kind", range(len(CATALOGUE)))
def test_every_shape_stays_in_its_sphere_and_on_the_floor(kind: int) -> None:
    rng = np.random.default_rng(kind)
    for _ in range(3):
        shape = CATALOGUE[kind](rng)
        points = torch.from_numpy(rng.uniform(-1.6, 1.6, (3, 20000)).astype(np.float32))
        inside = points[:, shape.distance(points) < 0]
        centre = torch.tensor([[0], [float(shape.height) / 2], [0]])
        assert inside.shape[1] > 100
        assert (inside - centre).norm(dim=0).max() <= shape.radius + 1e-4
        assert inside[1].min() > -0.02
        assert inside[1].max() <= shape.height + 0.02


@pytest.mark.parametrize(
    "solid",
    [
        sphere((0.1, 0.2, 0), 0.5),
        ellipsoid((0, 0, 0), (0.3, 0.5, 0.7)),
        box((0, 0.1, 0), (0.3, 0.4, 0.2), 0.05),
        cylinder((0, 0, 0.1), 0.4, 0.3, axis=2, rounding=0.02),
        torus((0, 0, 0), 0.5, 0.2),
        carve(sphere((0, 0, 0), 0.6), cylinder((0, 0, 0), 0.2, 1)),
        several([torus((side, 0, 0), 0.3, 0.1, axis=0) for side in (-0.5, 0.5)]),
    ],
)
def test_distances_never_promise_too_much(solid: Solid) -> None:
    """A ball of the promised radius around an outside point holds no inside point, as tracing needs."""
    rng = np.random.default_rng(0)
    points = rng.uniform(-1.2, 1.2, (3, 4000)).astype(np.float32)
    values = solid.distance(torch.from_numpy(points)).numpy()
    inside, outside = points[:, values < 0], points[:, values > 0][:, :300]
    nearest = np.linalg.norm(inside[:, :, None] - outside[:, None, :], axis=0).min(0)
    assert (values[values > 0][:300] <= nearest + 1e-5).all()


def test_a_cutout_has_straight_alpha() -> None:
    picture = render_cutout(make_object(6), 0.2, 0.3, make_light(np.random.default_rng(0)), 48)
    assert picture.shape == (48, 48, 4)
    edge = (picture[..., 3] > 0) & (picture[..., 3] < 255)
    assert edge.any()
    # an edge pixel has the object's colour, not a mixture with black
    assert picture[edge][:, :3].mean() > 0.5 * picture[picture[..., 3] == 255][:, :3].mean()


def test_views_of_an_object_look_alike() -> None:
    """The mean colour of the object is nearer to that of its other view than to most other objects'."""

    def colour(seed: int, number: int) -> np.ndarray:  # type: ignore[type-arg]
        view = reference_view(seed, number, 40)
        return view.image[view.mask > 128].mean(0)  # type: ignore[no-any-return]

    first, second = (np.stack([colour(seed, n) for seed in range(12)]) for n in range(2))
    ranks = np.argsort(np.linalg.norm(first[:, None] - second[None], axis=2), axis=1)
    assert np.mean([seed in ranks[seed, :2] for seed in range(12)]) > 0.7


def test_a_command_without_a_task_prints_its_help(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([]) == 2
    help_text = capsys.readouterr().err
    assert "--sheet FILE" in help_text
    assert "\n    python -m training.data.synthetic --sheet build/sheet.png\n" in help_text
    assert not list(tmp_path.iterdir())


def test_a_sheet_goes_where_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_sheet(tmp_path / "new" / "sheet.png", first=3, rows=1, side=16)
    assert Image.open(tmp_path / "new" / "sheet.png").size == (5 * 16, 16)
    assert "drawing objects" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["--examples", str(tmp_path / "file" / "x")]) == 2
    assert capsys.readouterr().err.startswith("synthetic: ")
    with pytest.raises(SystemExit, match="2"):
        main(["--sheet", str(tmp_path / "x.png"), "--first", "-1"])
    assert "seeds start at 0" in capsys.readouterr().err
