"""The contract: its stubs are current, its style is kept, and the runtime's types survive the wire."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor
from PIL import Image

from runtime.diffusion.presets import QUALITIES
from runtime.diffusion.samplers import SAMPLERS
from runtime.errors import InputError
from runtime.imaging.mask_levels import MASK_LEVELS
from runtime.imaging.masks import load_mask
from runtime.imaging.modes import MODES
from runtime.imaging.paste_back import EDGES
from runtime.imaging.pictures import WRITABLE_FORMATS, load_picture
from runtime.request import Blank, Edit, Move, Placement, Remove, Request, Sampling, Where
from runtime.rpc import compositor_pb2 as pb
from runtime.rpc import generate
from runtime.server import wire_values
from runtime.server.edit_wire import edit_from_message, message_from_edit
from runtime.server.wire import defaults_message, message_from_request, request_from_message
from tests.support.serving import BOX, OBJECT, SCENE, held_compositor

FILE = pb.DESCRIPTOR
SOURCE = (generate.PROTO / generate.SOURCE).read_text("utf-8")


def test_stubs_are_current() -> None:
    for name, text in generate.generate().items():
        assert (generate.HERE / name).read_text("utf-8") == text, "run: python -m runtime.rpc.generate"


# --- style: the rules of `buf lint` that can be seen from here --------------------------------------------


def test_package_is_versioned_and_lies_where_its_name_says() -> None:
    assert FILE.package == "anydoor.v1"
    assert FILE.name == "anydoor/v1/compositor.proto"


def messages(descriptors: list[Descriptor]) -> list[Descriptor]:
    return [one for each in descriptors for one in (each, *messages(list(each.nested_types)))]


def test_names_follow_the_conventions() -> None:
    for descriptor in messages(list(FILE.message_types_by_name.values())):
        assert re.fullmatch(r"([A-Z][a-z0-9]*)+", descriptor.name)
        for field in descriptor.fields:
            assert re.fullmatch(r"[a-z][a-z0-9_]*", field.name)
    for enum in FILE.enum_types_by_name.values():
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper()
        assert enum.values_by_number[0].name == f"{prefix}_UNSPECIFIED"
        assert all(value.name.startswith(f"{prefix}_") for value in enum.values)


def test_every_method_has_messages_of_its_own() -> None:
    for service in FILE.services_by_name.values():
        assert service.name.endswith("Service")
        for method in service.methods:
            assert method.input_type.name == f"{method.name}Request"
            # what is drawn or edited comes back as what is composited does
            answer = re.sub("Draw|Edit", "Composite", method.name)
            assert method.output_type.name == f"{answer}Response"


def test_everything_is_documented() -> None:
    declaration = re.compile(r"^\s*(message|enum|service|rpc|oneof)\b|^\s*[\w<>., ]+ \w+ = \d+;")
    lines = SOURCE.splitlines()
    for number, line in enumerate(lines):
        if declaration.match(line):
            assert lines[number - 1].strip().startswith("//"), f"line {number + 1} has no comment: {line}"


# --- the runtime's types and the wire's -------------------------------------------------------------------


def test_wire_has_every_name() -> None:
    assert wire_values.MODES.keys() == MODES.keys()
    assert tuple(wire_values.LEVELS) == MASK_LEVELS
    assert wire_values.SAMPLERS.keys() == SAMPLERS.keys()
    assert wire_values.EDGES.keys() == set(EDGES)
    assert wire_values.QUALITIES.keys() == QUALITIES.keys()
    assert wire_values.CONDITIONS.keys() == {"reference", "text"}
    assert wire_values.FORMATS.keys() == set(WRITABLE_FORMATS.values())


def test_request_survives_the_wire() -> None:
    request = Request(
        scene=SCENE,
        placements=[
            Placement(
                *(OBJECT, None, (-3, 4, 50, 60)),
                mode="keep_background",
                reference_ratio=1.3,
                box_ratio=1.0,
                crop_ratio=2.5,
            ),
            Placement(OBJECT, OBJECT, mask=SCENE, mode="shape", crop_ratio=1.5, mask_level="blob"),
            Placement(OBJECT, None, (3, 4, 50, 60), edge="soft", refine=0, strength=1.0),
            Placement(OBJECT, None, (3, 4, 50, 60), refine=300, strength=0.4),
        ],
        seed=2**62,
        sampling=Sampling("fast", 17, 0.0, 0.1, 0.3, "ddim", (0, 800), 5),
        num_images=3,
    )
    content = message_from_request(request, "WEBP").SerializeToString()
    back, file_format = request_from_message(pb.CompositeRequest.FromString(content))
    assert file_format == "WEBP"
    assert (back.seed, back.num_images, back.sampling) == (request.seed, 3, request.sampling)
    for sent, received in zip(request.placements, back.placements):
        assert vars(received) == vars(sent)


def test_seed_zero_is_a_seed() -> None:
    """Of a picture, and of an edit."""
    message = message_from_request(Request(SCENE, [Placement(OBJECT, box=BOX)], seed=0))
    assert request_from_message(message)[0].seed == 0
    edit = message_from_edit(Edit(SCENE, Where(mask=SCENE), Remove(), seed=0))
    assert edit_from_message(edit)[0].seed == 0


def test_unset_fields_are_open() -> None:
    request, file_format = request_from_message(pb.CompositeRequest(placements=[pb.Placement()]))
    assert (request.seed, request.num_images, request.sampling) == (None, 1, Sampling())
    assert vars(request.placements[0]) == vars(Placement())
    assert file_format == "PNG"


def test_a_drawing_survives_the_wire() -> None:
    request = Request.drawing("a cup", "", (768, 512), seed=7, sampling=Sampling(steps=9), num_images=2)
    content = message_from_request(request, "JPEG").SerializeToString()
    back, file_format = request_from_message(pb.DrawRequest.FromString(content))
    assert file_format == "JPEG"
    assert (back.scene, back.seed, back.num_images) == (Blank(768, 512), 7, 2)
    assert vars(back.placements[0]) == vars(Placement(prompt="a cup", negative_prompt=""))
    assert back.sampling == request.sampling


def test_prompts_of_placements_survive_the_wire() -> None:
    placements = [
        Placement(prompt="", box=BOX),
        Placement(prompt="eine Tasse ☕", negative_prompt="", mask=SCENE),
    ]
    content = message_from_request(Request(SCENE, placements)).SerializeToString()
    back, _ = request_from_message(pb.CompositeRequest.FromString(content))
    assert [vars(placement) for placement in back.placements] == [vars(placement) for placement in placements]


def test_open_fields_do_not_travel() -> None:
    message = message_from_request(Request(SCENE, [Placement(OBJECT, box=BOX)]))
    assert not message.HasField("seed")
    assert message.sampling == pb.Sampling()
    assert message.placements[0] == pb.Placement(
        reference=OBJECT, box=pb.Box(x0=10, y0=8, x1=60, y1=50), ratios=pb.Ratios()
    )


@pytest.mark.parametrize("name", [field.name for field in pb.Sampling.DESCRIPTOR.fields])
def test_each_parameter_travels_alone(name: str) -> None:
    """A parameter set to a value that is zero on the wire is still set."""
    values = {"quality": "fast", "sampler": "ddim", "guidance_interval": (0, 0)}
    sampling = Sampling(**{name: values.get(name, 0)})  # type: ignore[arg-type]
    content = message_from_request(Request(SCENE, [], sampling=sampling)).SerializeToString()
    assert request_from_message(pb.CompositeRequest.FromString(content))[0].sampling == sampling


def test_defaults_of_a_model_are_its_open_request(tiny_bundle: Path) -> None:
    compositor, _ = held_compositor(tiny_bundle)
    compositor.defaults = {
        **compositor.defaults,
        **{"guidance_scale": 2.0, "crop_ratio": 1.3, "mode": "keep_background", "map_steps": 7},
    }
    message = defaults_message(compositor.defaults)
    placement = pb.Placement(
        mode=message.mode,
        edge=message.edge,
        refine=message.refine,
        strength=message.strength,
        ratios=message.ratios,
    )
    back, _ = request_from_message(pb.CompositeRequest(sampling=message.sampling, placements=[placement]))
    for read in (back.sampling, back.placements[0]):
        for field in fields(read):
            assert getattr(read, field.name) in (compositor.defaults.get(field.name), False)
    assert (back.sampling.guidance_scale, back.sampling.map_steps) == (2.0, 7)
    assert (back.placements[0].mode, back.placements[0].crop_ratio) == ("keep_background", 1.3)


def test_pictures_in_memory_become_files(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (9, 7, 4), np.uint8)
    mask = np.zeros((9, 7), bool)
    mask[2:6, 2:6] = True
    Image.fromarray(array).save(tmp_path / "object.png")
    for picture in (array, Image.fromarray(array), tmp_path / "object.png", str(tmp_path / "object.png")):
        message = message_from_request(Request(SCENE, [Placement(picture, mask, BOX)]))
        np.testing.assert_array_equal(load_picture(message.placements[0].reference, "").rgb, array[..., :3])
        np.testing.assert_array_equal(load_mask(message.placements[0].reference_mask, ""), mask)


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (Request(Path("none.png"), [Placement(OBJECT, box=BOX)]), "cannot read the scene 'none.png'"),
        (Request(np.zeros((2, 3, 9), np.uint8), []), "the scene must be an array"),
        (Request(SCENE, [Placement(OBJECT, box=(0, 0, 2**40, 9))]), "cannot be sent"),
        (Request(SCENE, [Placement(OBJECT, box=(0, 0, 9))]), "four whole numbers"),
        (Request(SCENE, [Placement(OBJECT, box=BOX, mode="abacus")]), "no mode 'abacus'"),
        (Request(SCENE, [], sampling=Sampling(quality="superb")), "no quality 'superb': choose one of exact"),
        (Request(SCENE, [], sampling=Sampling(sampler="heun")), "no sampler 'heun': choose one of ddim"),
        (Request(SCENE, [], sampling=Sampling(guidance_interval=(7,))), "a lower and a higher timestep"),  # type: ignore[arg-type]
        (Request(SCENE, [Placement(OBJECT, box=BOX, mask=SCENE)]), "not both"),
        (Request(SCENE, [Placement(prompt="\ud83d", box=BOX)]), "U\\+D83D, half of a surrogate pair"),
        (Request(SCENE, [Placement(prompt=b"cup", box=BOX)]), "a prompt is text, not b'cup'"),  # type: ignore[arg-type]
        (Request.drawing("a cup", "\udc00"), "U\\+DC00, half of a surrogate pair"),
        (Request(Blank(), [Placement(prompt="a cup", box=BOX)]), "draws a single prompt"),
        (Request(Blank(), []), "draws a single prompt"),
        (Request(SCENE, [], seed=-1), "cannot be sent"),
        (Request(SCENE, [], initial_noise=np.zeros((1, 4, 8, 8), np.float32)), "does not take initial noise"),
        (Request(SCENE, [], sampling=Sampling(timesteps=(1, 2))), "initial noise or timesteps"),
    ],
)
def test_requests_that_cannot_be_sent(request_: Request, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        message_from_request(request_)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (Request(SCENE, [], seed=-1), "seed"),
        (Request(SCENE, [], num_images=-1), "num_images"),
        (Request(SCENE, [], sampling=Sampling(steps=-1)), "sampling.steps"),
        (Request(SCENE, [], sampling=Sampling(map_steps=2**32)), "sampling.map_steps"),
        (Request(SCENE, [Placement(OBJECT, box=BOX, refine=-7)]), "placements[0].refine"),
        (Edit(SCENE, Where(), Move(BOX, refine=-7)), "move.refine"),
        (Edit(SCENE, Where(), Remove(), seed=-1), "seed"),
    ],
    ids=["seed", "num_images", "steps", "map_steps", "refine", "move.refine", "seed-of-an-edit"],
)
def test_a_number_that_cannot_be_sent_is_named(request_: Request | Edit, field: str) -> None:
    send = message_from_edit if isinstance(request_, Edit) else message_from_request
    with pytest.raises(InputError, match="cannot be sent: a whole number from 0 to") as caught:
        send(request_)  # type: ignore[operator]
    assert caught.value.field == field
