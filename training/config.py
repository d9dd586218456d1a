"""Reads recipes: one TOML file describes a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from runtime.errors import InputError
from runtime.systems import anydoor, imprint
from runtime.toml_file import read_settings, read_toml
from runtime.validation import check_defaults
from training.data.augment import Augmentation
from training.data.cut_outs import CutOutRules
from training.data.pairs import CommonRules, Kind, PairRules
from training.data.sources import SOURCES
from training.loop_settings import LoopSettings
from training.network.architecture import Architecture, ArchitectureError
from training.network.imprint import ImprintArchitecture
from training.network.segmenter import SegmenterArchitecture
from training.network.stable_diffusion import StableDiffusionArchitecture
from training.ranges import check_least, check_shares
from training.systems.anydoor import Denoising
from training.systems.autoencoder import AutoencoderSettings, DecoderSettings
from training.systems.dreambooth import SubjectSettings
from training.systems.imprint import CompositingSettings, ViewsSettings

Default = bool | float | str | tuple[float, ...]


@dataclass(frozen=True)
class DataSettings:
    """How much is drawn for a model that learns from the renderer."""

    objects: int = 4000
    objects_folder: str = ""
    """Where the drawn objects are kept, for runs that share them; by default in the run's own folder."""
    pairs: int = 8000
    """Pairs that are encoded once, before training. If it is 0, they are made anew while training: AnyDoor's
    of views that are drawn for them, unless `stored_views`, IMPRINT's of the stored ones."""
    stored_views: bool = False
    """Whether AnyDoor's pairs that are made anew are made of the stored views."""
    repeats: int = 1
    """How often AnyDoor learns from a pair that is made anew."""
    kind: Kind = "multi-view"
    """What two views of an object count as for AnyDoor's timestep rule."""
    single: float = 0.0
    """Share of the pairs that are one view twice, as those of the sets of still images."""
    workers: int = 0
    """Processes that draw objects, and that make pairs while others are encoded; 0 makes them in turn, see
    `worker_count`."""

    def __post_init__(self) -> None:
        """Refuses numbers of nothing.

        Raises:
            InputError: names the setting.
        """
        check_least(self, 1, "objects", "repeats")
        check_least(self, 0, "pairs")
        check_shares(self, "single")

    def objects_in(self, own: Path) -> Path:
        """Gives the folder of the drawn objects; `own` is that of a run that shares none."""
        return Path(self.objects_folder) if self.objects_folder else own


@dataclass(frozen=True)
class SourceSettings:
    """A data set on disk."""

    name: str
    """A key of `training.data.sources.SOURCES`."""
    root: str
    weight: float = 1.0
    """How often it is drawn from in relation to the others."""

    def __post_init__(self) -> None:
        check_least(self, 0, "weight")


@dataclass(frozen=True)
class StageSource(SourceSettings):
    """A data set of one of IMPRINT's stages."""

    stage: Literal["views", "compositing"] = "compositing"
    """Which stage learns from it."""


@dataclass(frozen=True)
class CommonRecipe:
    """What the runs of all systems have in common. A stage without a section is not run."""

    start: str = ""
    """A checkpoint to go on from; what small models train by themselves, autoencoder and image encoder, is
    taken from there."""
    encoders: str = ""
    """A checkpoint whose autoencoder and image encoder are taken as they are, for small models that do not
    train their own. AnyDoor's hint block starts from it, too."""
    checkpoint_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the weights in the written checkpoint."""
    architecture: Architecture = field(default_factory=Architecture)
    data: DataSettings = field(default_factory=DataSettings)
    pairs: CommonRules = field(default_factory=CommonRules)
    autoencoder: AutoencoderSettings | None = None
    decoder: DecoderSettings | None = None
    identity: LoopSettings | None = None
    sources: tuple[SourceSettings, ...] = ()
    """What is learned from; if empty, rendered and encoded pairs."""
    defaults: Mapping[str, Default] = field(default_factory=dict)
    """What a request should use where it gives no value: parameter, like guidance_scale or mode -> value.
    Written into the checkpoint and used for the sheets of samples."""

    @property
    def objects(self) -> str:
        """The name of a run's own folder of drawn objects."""
        return "objects"

    def objects_in(self, folder: Path) -> Path:
        """Gives the folder of the drawn objects of the run in `folder`."""
        return self.data.objects_in(folder / self.objects)

    @property
    def has_encoders(self) -> bool:
        """Whether autoencoder and image encoder come from a checkpoint: their stages train nothing then."""
        return bool(self.start or self.encoders)

    def default_number(self, name: str, otherwise: float) -> float:
        """Gives a number of [defaults].

        Raises:
            InputError: it is none.
        """
        value = self.defaults.get(name, otherwise)
        if not isinstance(value, int | float):
            raise InputError(f"[defaults] {name} is {value!r}; expected a number")
        return value

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the pictures' latents."""
        side = self.pairs.resolution // self.architecture.latent_factor
        return self.architecture.latent_channels, side, side


@dataclass(frozen=True)
class Recipe(CommonRecipe):
    """A training run of AnyDoor."""

    system: Literal["anydoor"] = "anydoor"
    pairs: PairRules = field(default_factory=PairRules)
    denoising: Denoising = field(default_factory=Denoising)
    hint_block: LoopSettings | None = None
    diffusion: LoopSettings | None = None

    @property
    def objects(self) -> str:
        """The name of a run's own folder of drawn objects."""
        return "views"


@dataclass(frozen=True)
class ImprintRecipe(CommonRecipe):
    """A training run of IMPRINT."""

    system: Literal["imprint"] = "imprint"
    unet: str = ""
    """A checkpoint whose UNet and projector training starts from, as the paper's starts from those of Stable
    Diffusion. It may be AnyDoor's: the scene is ignored at first, and the adapter's blocks change nothing."""
    architecture: ImprintArchitecture = field(default_factory=ImprintArchitecture)
    augmentation: Augmentation = field(default_factory=Augmentation)
    """How an object is changed before it is put back into its picture."""
    views: ViewsSettings | None = None
    """Stage 1; without it the encoder is the start's."""
    compositing: CompositingSettings | None = None
    """Stage 2."""
    sources: tuple[StageSource, ...] = ()

    @property
    def is_stored(self) -> bool:
        """Whether the samples of stage 2 are encoded once: rendered ones that no learning part encodes."""
        learns = self.compositing is not None and self.compositing.backbone
        return not self.sources and not learns and self.data.pairs > 0


@dataclass(frozen=True)
class DreamBoothRecipe:
    """A training run of DreamBooth."""

    start: str
    """Stable Diffusion, or an inpainting model of it: a folder in diffusers' layout."""
    subject: SubjectSettings
    system: Literal["dreambooth"] = "dreambooth"
    checkpoint_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the weights in the written checkpoints."""
    layout: Literal["original", "diffusers"] = "original"
    """Layout of the written checkpoints: a single file as the original's, or a folder that diffusers opens,
    with the start's tokenizer."""

    def __post_init__(self) -> None:
        if self.subject.rank and self.layout != "original":
            raise InputError(
                "layout has no effect with a rank: low-rank updates are a single file, which diffusers reads"
            )


@dataclass(frozen=True)
class StableDiffusionRecipe:
    """A training run of a small Stable Diffusion model, on rendered objects with captions."""

    start: str
    """A checkpoint in the original layout, whose autoencoder is taken; or a folder with a whole Stable
    Diffusion model in diffusers' layout."""
    diffusion: LoopSettings
    system: Literal["stable_diffusion"] = "stable_diffusion"
    unet: str = ""
    """A checkpoint whose UNet training starts from, like a small IMPRINT's; what it sees of a scene is left
    out."""
    checkpoint_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the weights in the written checkpoint."""
    architecture: StableDiffusionArchitecture = field(default_factory=StableDiffusionArchitecture)
    data: DataSettings = field(default_factory=DataSettings)
    resolution: int = 64
    """Side of the pictures, in pixels."""
    guidance_scale: float = 3.0
    """Guidance scale of the sheets of samples."""
    previews: tuple[str, ...] = ("a mug",)
    """Their prompts."""

    def __post_init__(self) -> None:
        check_least(self, 1, "resolution")
        check_least(self, 0, "guidance_scale")

    @property
    def has_whole_start(self) -> bool:
        """Whether all parts go on from the start."""
        return Path(self.start).is_dir()


@dataclass(frozen=True)
class SegmenterRecipe:
    """A training run of a small segmenter, on rendered objects."""

    segmentation: LoopSettings
    system: Literal["segmenter"] = "segmenter"
    architecture: SegmenterArchitecture = field(default_factory=SegmenterArchitecture)
    data: DataSettings = field(default_factory=DataSettings)
    pictures: CutOutRules = field(default_factory=CutOutRules)
    """How the pictures are made of the rendered views."""


AnyRecipe = Recipe | ImprintRecipe | DreamBoothRecipe | StableDiffusionRecipe | SegmenterRecipe

RECIPES: Mapping[str, type[AnyRecipe]] = {
    "anydoor": Recipe,
    "imprint": ImprintRecipe,
    "dreambooth": DreamBoothRecipe,
    "stable_diffusion": StableDiffusionRecipe,
    "segmenter": SegmenterRecipe,
}
"""System -> what its recipes say."""


_DEFAULTS: Mapping[str, Mapping[str, Any]] = {"anydoor": anydoor.DEFAULTS, "imprint": imprint.DEFAULTS}
"""System -> what the runtime takes where [defaults] has nothing."""


def read_recipe(path: Path, changes: Sequence[str] = ()) -> AnyRecipe:
    """Reads a recipe; missing settings have their defaults, and the system is AnyDoor.

    `changes` are lines like "compositing.swap=1", see `runtime.toml_file.read_toml`.

    Raises:
        InputError: it cannot be read, or a section, a setting or a value is not one that exists.
    """
    system = read_toml(path, "the recipe", changes).get("system", "anydoor")
    if not isinstance(system, str) or system not in RECIPES:
        raise InputError(f"'{path}': system is {system!r}, expected {' or '.join(RECIPES)}")
    try:
        recipe = read_settings(path, RECIPES[system], "the recipe", changes)
    except ArchitectureError as error:
        raise InputError(f"'{path}': [architecture]: {error}") from error
    if not isinstance(recipe, DreamBoothRecipe):
        _check_architecture(path, recipe.architecture)
    if isinstance(recipe, StableDiffusionRecipe) and recipe.resolution % (
        step := recipe.architecture.side_step
    ):
        raise InputError(f"'{path}': resolution is {recipe.resolution}; expected a multiple of {step}")
    if isinstance(recipe, DreamBoothRecipe | StableDiffusionRecipe | SegmenterRecipe):
        return recipe
    try:
        check_defaults({**_DEFAULTS[recipe.system], **recipe.defaults})
    except InputError as error:
        raise InputError(f"'{path}': [defaults]: {error}") from error
    _check_sides(path, recipe)
    _check_sources(path, recipe.sources)
    if isinstance(recipe, ImprintRecipe):
        _check_imprint(path, recipe)
    elif recipe.denoising.attention_guide:
        _check_guide(path, recipe)
    return recipe


def _check_architecture(path: Path, architecture: object) -> None:
    """Refuses widths that the groups of the normalisation layers do not divide."""
    values = vars(architecture)
    for part in ("unet", "vae"):
        groups = values.get(f"{part}_norm_groups", 1)
        if any(width % groups for width in values.get(f"{part}_channels", ())):
            raise InputError(
                f"'{path}': [architecture]: {part}_channels must be multiples of {part}_norm_groups, {groups}"
            )


def _check_sides(path: Path, recipe: CommonRecipe) -> None:
    """Refuses pictures that the autoencoder or the UNet cannot halve often enough."""
    factor = recipe.architecture.latent_factor
    for stage in ("autoencoder", "decoder"):
        settings = getattr(recipe, stage)
        if settings and settings.side % factor:
            raise InputError(f"'{path}': [{stage}]: side is {settings.side}; expected a multiple of {factor}")
    step = recipe.architecture.side_step
    if recipe.pairs.resolution % step:
        raise InputError(
            f"'{path}': [pairs]: resolution is {recipe.pairs.resolution}; expected a multiple of {step}"
        )


def _check_sources(path: Path, sources: Sequence[SourceSettings]) -> None:
    """Refuses data sets that do not exist, or of which none is ever drawn from."""
    for source in sources:
        if source.name not in SOURCES:
            raise InputError(f"'{path}': no data set is called '{source.name}'; known: {', '.join(SOURCES)}")
    if sources and not any(source.weight for source in sources):
        raise InputError(f"'{path}': no data set of [[sources]] has a weight above 0")


def _check_guide(path: Path, recipe: Recipe) -> None:
    """Refuses a guide that the data or the network do not allow."""
    if recipe.sources:
        raise InputError(f"'{path}': [denoising] attention_guide is for rendered pairs, not for [[sources]]")
    _check_heads(path, recipe.architecture, "denoising", recipe.denoising.guided_heads)


def _check_heads(path: Path, levels: Architecture, stage: str, guided: int) -> None:
    """Refuses to guide more heads than a level of the UNet has."""
    counts = zip(levels.unet_heads, levels.unet_attention, strict=True)
    least = min((count for count, attends in counts if attends), default=guided)
    if least < guided:
        raise InputError(
            f"'{path}': [{stage}] guided_heads is {guided}, and a level of [architecture] has {least}"
        )


def _check_imprint(path: Path, recipe: ImprintRecipe) -> None:
    """Refuses stages that would have nothing to learn from."""
    for stage in ("views", "compositing"):
        listed = any(source.stage == stage and source.weight for source in recipe.sources)
        if recipe.sources and getattr(recipe, stage) and not listed:
            raise InputError(
                f"'{path}': no data set of [[sources]] with a weight above 0 is for the stage {stage}"
            )
        settings = getattr(recipe, stage)
        if settings and settings.attention_guide:
            _check_heads(path, recipe.architecture, stage, settings.guided_heads)
