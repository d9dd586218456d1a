"""From objects and scenes to pictures: sphere tracing, shading and soft contact shadows, in plain numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from training.data.synthetic.catalogue import CATALOGUE
from training.data.synthetic.paint import HEIGHT, Colour, linear, palette, wrap_picture
from training.data.synthetic.scenes import Camera, Light, Scene, Surface
from training.data.synthetic.shapes import Part, Shape, length

Array = NDArray[np.float32]
Picture = NDArray[np.uint8]
Indices = NDArray[np.intp]

STEPS = 40  # sphere tracing gives up after so many steps; grazing rays are the slow ones
NEAR = np.float32(0.004)  # a ray this near to a surface has hit it
SAMPLES = 2  # rays per pixel along each axis
CELL = 4  # pixels along each axis that share one coarse ray

Window = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class ObjectSpec:
    """One thing: a shape with its own paint."""

    seed: int
    shape: Shape
    wraps: tuple[Array, Array]  # for round parts (HEIGHT, 3 HEIGHT, 3) and box faces (HEIGHT, HEIGHT, 3)
    accents: Array  # (4, 3), linear light: colours 1, 2 and 3 of the parts
    gloss: float  # 0 matt .. 1 shiny
    colours: tuple[Colour, ...]  # of the wraps; the first is their ground
    pattern: str  # see Wrap
    mark: str


@dataclass(frozen=True)
class Pose:
    """Where an object stands on the floor, and how."""

    x: float = 0.0
    z: float = 0.0
    yaw: float = 0.0  # radians about the upright axis
    scale: float = 1.0


@lru_cache(maxsize=256)
def make_object(seed: int) -> ObjectSpec:
    """Makes the object of a number: the same on every call."""
    rng = np.random.default_rng([seed, 1])
    shape = CATALOGUE[int(rng.integers(len(CATALOGUE)))](rng)
    colours = palette(rng, 5)
    paint = int(rng.integers(2**32))
    wraps = [wrap_picture(np.random.default_rng(paint), colours, fronts) for fronts in (3, 1)]
    accents = np.stack([linear(c) for c in (colours[0], colours[4], colours[2], (30, 28, 34))])
    return ObjectSpec(
        seed,
        shape,
        (wraps[0].picture, wraps[1].picture),
        accents,
        float(rng.uniform(0, 1)),
        tuple(colours),
        wraps[0].pattern,
        wraps[0].mark,
    )


def sample(picture: Array, u: Array, v: Array) -> Array:
    """Reads colours (3, N) of a repeating picture (H, W, 3), at positions in units of its sides; bilinear."""
    height, width, _ = picture.shape
    x, y = u * width - np.float32(0.5), v * height - np.float32(0.5)
    left, top = np.floor(x), np.floor(y)
    fx, fy = x - left, y - top
    (x0, x1), (y0, y1) = _wrapped_pairs(left, width), _wrapped_pairs(top, height)
    flat = picture.reshape(-1, 3)

    def row(start: Indices) -> Array:
        ends = [np.ascontiguousarray(flat.take(start * width + at, 0).T) for at in (x0, x1)]
        return np.asarray(ends[0] * (1 - fx) + ends[1] * fx)

    result: Array = row(y0) * (1 - fy) + row(y1) * fy
    return result


def _wrapped_pairs(places: Array, count: int) -> tuple[Indices, Indices]:
    """The index at whole places of an axis that repeats after `count`, and the one behind it."""
    index = places.astype(np.intp)
    index -= index // count * count  # np.remainder takes several times as long
    behind = index + 1
    behind[behind == count] = 0
    return index, behind


class Body:
    """An object in its place: what rays can hit."""

    def __init__(self, spec: ObjectSpec, pose: Pose) -> None:
        self.spec, self.pose = spec, pose
        sine, cosine = np.sin(pose.yaw), np.cos(pose.yaw)
        # rows: the object's axes in the scene
        self.turn = np.array([[cosine, 0, -sine], [0, 1, 0], [sine, 0, cosine]], np.float32)
        self.offset = np.array([[pose.x], [0], [pose.z]], np.float32)
        self.middle = self.offset + np.array([[0], [spec.shape.height / 2 * pose.scale], [0]], np.float32)
        self.radius = np.float32(spec.shape.radius * pose.scale)

    def inside(self, points: Array) -> Array:
        """Converts scene coordinates (3, N) to the object's own."""
        result: Array = self.turn @ (points - self.offset) / np.float32(self.pose.scale)
        return result

    def distance(self, own: Array) -> Array:
        """Computes signed distance, in the object's units, at points in its own coordinates."""
        parts = self.spec.shape.parts
        nearest = parts[0].distance(own)
        for part in parts[1:]:
            nearest = np.minimum(nearest, part.distance(own))
        return nearest

    def span(self, origin: Array, rays: Array, slope: float = 0.0) -> tuple[Array, Array]:
        """Computes where unit rays (3, N), or cones that widen by `slope`, may meet the body: start and end.

        The end is before the start where they cannot.
        """
        towards = self.middle - origin
        along = towards[0] * rays[0] + towards[1] * rays[1] + towards[2] * rays[2]
        radius = self.radius + np.float32(slope) * along
        gap = radius**2 - (np.square(towards).sum() - along**2)
        half = np.sqrt(np.maximum(gap, 0))
        return along - half, np.where(gap > 0, along + half, -np.inf)

    def trace(
        self, origin: Array, rays: Array, start: Array, end: Array, slope: float
    ) -> tuple[Indices, Array]:
        """Finds which of the rays hit between start and end, and where they stop.

        A ray stands for a cone whose radius grows by `slope`: it stops as soon as the cone may touch, at a
        depth where nothing in the cone has touched yet. A thin ray has slope 0.
        """
        alive = np.flatnonzero(start < end)
        start, end = start[alive], end[alive]
        own_origin, scale = self.inside(origin), np.float32(self.pose.scale)
        own_rays = (self.turn @ rays[:, alive]) / scale
        near, widening = NEAR * scale, np.float32(slope)
        hits, depths = [], []
        for _ in range(STEPS):
            free = self.distance(own_origin + own_rays * start) * scale - widening * start
            hit = free < near
            stopped = hit.nonzero()[0]
            hits.append(alive[stopped])
            depths.append(start[stopped])
            start = start + free
            going = (~hit & (start < end)).nonzero()[0]
            if len(going) < len(alive):
                alive, start, end = (values.take(going) for values in (alive, start, end))
                own_rays = own_rays.take(going, 1)
            if not len(alive):
                break
        return np.concatenate(hits), np.concatenate(depths)

    def normals(self, own: Array) -> Array:
        """Computes unit normals (3, N), object coordinates, from four distances around each point."""
        total = np.zeros_like(own)
        for corner in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
            step = np.array(corner, np.float32)[:, None]
            total += step * self.distance(own + step * np.float32(0.004))
        result: Array = total / np.maximum(length(total), np.float32(1e-6))
        return result

    def paint(self, own: Array, normals: Array) -> Array:
        """Computes albedo (3, N) at surface points."""
        parts = self.spec.shape.parts
        nearest = np.argmin(np.stack([part.distance(own) for part in parts]), axis=0)
        albedo = np.empty_like(own)
        for index, part in enumerate(parts):
            here = nearest == index
            if part.colour:
                albedo[:, here] = self.spec.accents[part.colour][:, None]
            elif here.any():
                albedo[:, here] = wrapped(part, self.spec.wraps, own[:, here], normals[:, here])
        return albedo


def wrapped(part: Part, wraps: tuple[Array, Array], own: Array, normals: Array) -> Array:
    """Reads the wrap picture on a part: around the y axis, or on the face that the normal points to."""
    q = (own - np.array(part.centre, np.float32)[:, None]) / np.array(part.half, np.float32)[:, None]
    v = 0.5 - 0.5 * q[1]
    if part.wrap == "round":
        inset = np.float32(0.5 / HEIGHT)
        return sample(
            wraps[0], np.arctan2(q[0], q[2]) / np.float32(2 * np.pi) + 0.5, np.clip(v, inset, 1 - inset)
        )
    face = np.abs(normals).argmax(0)
    u = np.where(face == 0, -q[2] * np.sign(normals[0]), q[0] * np.where(face == 2, np.sign(normals[2]), 1))
    v = np.where(face == 1, 0.5 + 0.5 * q[2], v)
    return sample(wraps[1], np.clip(0.5 + 0.5 * u, 0.002, 0.998), np.clip(v, 0.002, 0.998))


def shade(body: Body, light: Light, origin: Array, rays: Array, depths: Array) -> Array:
    """Computes the light (3, N) from hit points: ambient with occlusion, diffuse, a highlight."""
    points = origin + rays * depths
    own = body.inside(points)
    own_normals = body.normals(own)
    albedo = body.paint(own, own_normals)
    normals = body.turn.T @ own_normals
    # how soon the surface comes back when we leave it along the normal: creases and the foot get dark
    reach = np.float32(0.12)
    open_sky = np.clip(body.distance(own + own_normals * reach) / reach, 0, 1)
    foot = np.clip(points[1] / np.float32(0.25 * body.pose.scale), 0, 1)
    occlusion = (0.35 + 0.65 * open_sky) * (0.55 + 0.45 * foot)
    facing = np.clip((normals * light.direction).sum(0), 0, 1)
    from_above = 0.65 + 0.35 * normals[1]
    half_way = light.direction - rays
    half_way /= length(half_way)
    sharpness = np.float32(12 + 60 * body.spec.gloss)
    shine = np.clip((normals * half_way).sum(0), 0, 1) ** sharpness * np.float32(0.12 + 0.4 * body.spec.gloss)
    diffuse = light.ambient[:, None] * (from_above * occlusion) + light.colour[:, None] * facing
    result: Array = albedo * diffuse + light.colour[:, None] * (shine * (facing > 0))
    return result


def pixel_grid(window: Window, pitch: float) -> tuple[Array, Array]:
    """Columns and rows, in pixels, of sample points `pitch` pixels apart in a window."""
    left, top, right, bottom = window
    columns = np.arange(left + pitch / 2, right, pitch, dtype=np.float32)
    rows = np.arange(top + pitch / 2, bottom, pitch, dtype=np.float32)
    return np.tile(columns, len(rows)), np.repeat(rows, len(columns))


def window_of(body: Body, camera: Camera, size: tuple[int, int]) -> Window:
    """Finds the pixels in which the body's sphere can be seen, a whole number of coarse cells."""
    centre = camera.project(body.middle, size)[:, 0]
    eye, _ = camera.rays(np.zeros(1, np.float32), np.zeros(1, np.float32), size)
    distance = np.sqrt(np.square(body.middle - eye).sum())
    # the outline of a sphere off the axis is an ellipse: a little more than its radius
    tangent = body.radius / np.sqrt(max(distance**2 - body.radius**2, 0.1))
    reach = 1.1 * tangent * min(size) / (2 * camera.spread)
    limit = -(-np.array(size) // CELL)
    left, top = (int(v) * CELL for v in np.clip(np.floor((centre - reach) / CELL), 0, limit))
    right, bottom = (int(v) * CELL for v in np.clip(np.ceil((centre + reach) / CELL), 0, limit))
    return left, top, right, bottom


def first_hits(
    body: Body, camera: Camera, size: tuple[int, int], window: Window
) -> tuple[Array, Array, Indices, Array]:
    """Traces spheres in two passes: cones of a cell each, then the cells' rays from where their cone stopped.

    Returns:
        The rays' origin (3, 1), the unit rays that hit (3, N), their sample numbers and their depths (N,).
    """
    across, down = (window[2] - window[0]) // CELL, (window[3] - window[1]) // CELL
    origin, cones = camera.rays(*pixel_grid(window, CELL), size)
    # half the diagonal of a cell, with a little to spare for the picture's corners
    slope = 0.75 * CELL * 2 * camera.spread / min(size)
    cells, depths = body.trace(origin, cones, *body.span(origin, cones, slope), slope)
    start = np.full(across * down, np.inf, np.float32)
    start[cells] = depths
    fine = CELL * SAMPLES
    start = start.reshape(down, across).repeat(fine, 0).repeat(fine, 1).ravel()
    columns, rows = pixel_grid(window, 1 / SAMPLES)
    chosen = np.flatnonzero(np.isfinite(start))
    origin, rays = camera.rays(columns[chosen], rows[chosen], size)
    hits, depths = body.trace(origin, rays, start[chosen], body.span(origin, rays)[1], 0.0)
    return origin, rays[:, hits], chosen[hits], depths


def draw_body(body: Body, light: Light, camera: Camera, size: tuple[int, int]) -> tuple[Array, Array]:
    """Draws premultiplied light (H, W, 3) and coverage (H, W), 0..1, of one body alone."""
    width, height = size
    picture, coverage = np.zeros((height, width, 3), np.float32), np.zeros((height, width), np.float32)
    window = window_of(body, camera, size)
    left, top, right, bottom = window
    if right <= left or bottom <= top:
        return picture, coverage
    origin, rays, hits, depths = first_hits(body, camera, size, window)
    colours = np.minimum(shade(body, light, origin, rays, depths), 1)
    across, down = right - left, bottom - top
    cells = hits // (across * SAMPLES) // SAMPLES * across + hits % (across * SAMPLES) // SAMPLES
    sums = [
        np.bincount(cells, values, across * down).reshape(down, across)
        for values in (*colours, np.ones(len(hits)))
    ]
    shares = np.stack(sums, -1)[: height - top, : width - left] / SAMPLES**2
    picture[top:bottom, left:right] = shares[..., :3]
    coverage[top:bottom, left:right] = shares[..., 3]
    return picture, coverage


def shadow(bodies: Sequence[Body], light: Light, points: Array) -> tuple[Array, Array]:
    """Computes what is left of the direct and of the ambient light at floor points (3, N)."""
    direct, ambient = np.ones(points.shape[1], np.float32), np.ones(points.shape[1], np.float32)
    for body in bodies:
        near = np.flatnonzero(np.square(points - body.offset)[[0, 2]].sum(0) < (3.2 * body.radius) ** 2)
        if not len(near):
            continue
        here = body.inside(points[:, near])
        lifted = here + np.array([[0], [0.02], [0]], np.float32)
        ambient[near] *= 0.35 + 0.65 * np.clip(body.distance(lifted) / np.float32(0.45), 0, 1) ** np.float32(
            0.7
        )
        way = body.turn @ light.direction
        left, travel = np.ones(len(near), np.float32), np.full(len(near), 0.03, np.float32)
        for _ in range(12):  # the nearest miss on the way to the light, relative to how far it is: a penumbra
            gap = body.distance(lifted + way * travel)
            left = np.minimum(left, np.clip(7 * gap / travel, 0, 1))
            travel = travel + np.clip(gap, np.float32(0.05), np.float32(0.25))
        direct[near] *= left
    return direct, ambient


def draw_room(scene: Scene, bodies: Sequence[Body], size: tuple[int, int]) -> Array:
    """Draws the light (H, W, 3) of floor and wall, with the bodies' shadows on the floor."""
    width, height = size
    columns, rows = pixel_grid((0, 0, width, height), 1)
    origin, rays = scene.camera.rays(columns, rows, size)
    light = scene.light
    to_wall = (-np.float32(scene.wall_distance) - origin[2]) / np.minimum(rays[2], np.float32(-1e-4))
    to_floor = np.where(rays[1] < -1e-4, -origin[1] / np.minimum(rays[1], np.float32(-1e-4)), np.inf)
    on_floor = to_floor < to_wall
    out = np.empty_like(rays)
    floor = origin + rays[:, on_floor] * to_floor[on_floor]
    direct, ambient = shadow(bodies, light, floor)
    # the corner under the wall is darker, as in any room
    corner = 0.7 + 0.3 * np.clip((floor[2] + np.float32(scene.wall_distance)) / np.float32(0.8), 0, 1)
    strength = light.colour[:, None] * (direct * light.direction[1]) + light.ambient[:, None] * (
        ambient * corner
    )
    out[:, on_floor] = tiled(scene.floor, floor[0], floor[2]) * strength
    wall = origin + rays[:, ~on_floor] * to_wall[~on_floor]
    fade = 0.75 + 0.25 * np.clip(wall[1] / np.float32(0.8), 0, 1)
    grazing = np.clip(light.direction[2] * np.float32(0.9) + np.float32(0.1), 0.1, 1)
    strength = light.colour[:, None] * grazing + light.ambient[:, None] * fade
    out[:, ~on_floor] = tiled(scene.wall, wall[0], -wall[1]) * strength
    result: Array = out.T.reshape(height, width, 3)
    return result


def tiled(surface: Surface, across: Array, along: Array) -> Array:
    """Reads colours (3, N) of a surface at positions in scene units."""
    size = np.float32(surface.size)
    return sample(surface.picture, across / size, along / size)


def developed(light: Array) -> Picture:
    """Converts linear light to 8-bit sRGB."""
    return (np.sqrt(np.clip(light, 0, 1)) * 255 + 0.5).astype(np.uint8)


Placed = tuple[ObjectSpec, Pose]


def render_all(
    scene: Scene, placed: Sequence[Placed], size: tuple[int, int]
) -> tuple[Picture, list[Picture]]:
    """Draws a picture of the scene with objects in it.

    Args:
        scene: the room.
        placed: objects and where they stand; any number.
        size: (width, height) in pixels.

    Returns:
        The picture, uint8 (H, W, 3), and per object the share of each pixel it covers, uint8 (H, W), 0..255.
    """
    bodies = [Body(spec, pose) for spec, pose in placed]
    picture = draw_room(scene, bodies, size)
    drawn = [draw_body(body, scene.light, scene.camera, size) for body in bodies]
    masks = [np.zeros(picture.shape[:2], np.float32) for _ in bodies]
    # the painter's way: far bodies first, each covering what is behind it
    for index in sorted(range(len(bodies)), key=lambda i: bodies[i].pose.z):
        light, coverage = drawn[index]
        picture = picture * (1 - coverage[..., None]) + light
        masks = [m * (1 - coverage) for m in masks]
        masks[index] = coverage
    return developed(picture), [(m * 255 + 0.5).astype(np.uint8) for m in masks]


def render(scene: Scene, spec: ObjectSpec, pose: Pose, size: tuple[int, int]) -> tuple[Picture, Picture]:
    """Draws a picture (H, W, 3) of one object in a scene, and its mask (H, W): covered share times 255."""
    picture, masks = render_all(scene, [(spec, pose)], size)
    return picture, masks[0]


def render_background(scene: Scene, size: tuple[int, int]) -> Picture:
    """Draws the same room without any object."""
    return render_all(scene, [], size)[0]


def render_cutout(spec: ObjectSpec, yaw: float, elevation: float, light: Light, size: int) -> Picture:
    """Draws the object alone in a square: uint8 RGBA (size, size, 4), colours not multiplied with alpha."""
    camera = Camera(6.0, elevation, spec.shape.height / 2, spec.shape.radius / 5.8)
    colour, coverage = draw_body(Body(spec, Pose(yaw=yaw)), light, camera, (size, size))
    straight = colour / np.maximum(coverage, np.float32(1e-3))[..., None]
    return np.dstack([developed(straight), (coverage * 255 + 0.5).astype(np.uint8)])
