from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PlacementMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PLACEMENT_MODE_UNSPECIFIED: _ClassVar[PlacementMode]
    PLACEMENT_MODE_CROP: _ClassVar[PlacementMode]
    PLACEMENT_MODE_SHAPE: _ClassVar[PlacementMode]
    PLACEMENT_MODE_KEEP_BACKGROUND: _ClassVar[PlacementMode]

class Edge(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EDGE_UNSPECIFIED: _ClassVar[Edge]
    EDGE_HARD: _ClassVar[Edge]
    EDGE_SOFT: _ClassVar[Edge]

class MaskLevel(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MASK_LEVEL_UNSPECIFIED: _ClassVar[MaskLevel]
    MASK_LEVEL_EXACT: _ClassVar[MaskLevel]
    MASK_LEVEL_OUTLINE: _ClassVar[MaskLevel]
    MASK_LEVEL_BLOB: _ClassVar[MaskLevel]
    MASK_LEVEL_BOX: _ClassVar[MaskLevel]

class Quality(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    QUALITY_UNSPECIFIED: _ClassVar[Quality]
    QUALITY_EXACT: _ClassVar[Quality]
    QUALITY_BALANCED: _ClassVar[Quality]
    QUALITY_FAST: _ClassVar[Quality]

class Sampler(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SAMPLER_UNSPECIFIED: _ClassVar[Sampler]
    SAMPLER_DDIM: _ClassVar[Sampler]
    SAMPLER_DPM_SOLVER_2M: _ClassVar[Sampler]

class ImageFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IMAGE_FORMAT_UNSPECIFIED: _ClassVar[ImageFormat]
    IMAGE_FORMAT_PNG: _ClassVar[ImageFormat]
    IMAGE_FORMAT_JPEG: _ClassVar[ImageFormat]
    IMAGE_FORMAT_WEBP: _ClassVar[ImageFormat]
    IMAGE_FORMAT_AVIF: _ClassVar[ImageFormat]

class Condition(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONDITION_UNSPECIFIED: _ClassVar[Condition]
    CONDITION_REFERENCE: _ClassVar[Condition]
    CONDITION_TEXT: _ClassVar[Condition]
PLACEMENT_MODE_UNSPECIFIED: PlacementMode
PLACEMENT_MODE_CROP: PlacementMode
PLACEMENT_MODE_SHAPE: PlacementMode
PLACEMENT_MODE_KEEP_BACKGROUND: PlacementMode
EDGE_UNSPECIFIED: Edge
EDGE_HARD: Edge
EDGE_SOFT: Edge
MASK_LEVEL_UNSPECIFIED: MaskLevel
MASK_LEVEL_EXACT: MaskLevel
MASK_LEVEL_OUTLINE: MaskLevel
MASK_LEVEL_BLOB: MaskLevel
MASK_LEVEL_BOX: MaskLevel
QUALITY_UNSPECIFIED: Quality
QUALITY_EXACT: Quality
QUALITY_BALANCED: Quality
QUALITY_FAST: Quality
SAMPLER_UNSPECIFIED: Sampler
SAMPLER_DDIM: Sampler
SAMPLER_DPM_SOLVER_2M: Sampler
IMAGE_FORMAT_UNSPECIFIED: ImageFormat
IMAGE_FORMAT_PNG: ImageFormat
IMAGE_FORMAT_JPEG: ImageFormat
IMAGE_FORMAT_WEBP: ImageFormat
IMAGE_FORMAT_AVIF: ImageFormat
CONDITION_UNSPECIFIED: Condition
CONDITION_REFERENCE: Condition
CONDITION_TEXT: Condition

class CompositeRequest(_message.Message):
    __slots__ = ("scene", "placements", "sampling", "seed", "num_images", "output_format", "model")
    SCENE_FIELD_NUMBER: _ClassVar[int]
    PLACEMENTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    NUM_IMAGES_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    scene: bytes
    placements: _containers.RepeatedCompositeFieldContainer[Placement]
    sampling: Sampling
    seed: int
    num_images: int
    output_format: ImageFormat
    model: str
    def __init__(self, scene: _Optional[bytes] = ..., placements: _Optional[_Iterable[_Union[Placement, _Mapping]]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., seed: _Optional[int] = ..., num_images: _Optional[int] = ..., output_format: _Optional[_Union[ImageFormat, str]] = ..., model: _Optional[str] = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("reference", "reference_mask", "box", "mask", "mode", "ratios", "mask_level", "reference_clicks", "automatic_mask", "prompt", "negative_prompt", "keep_specks", "views", "edge", "refine", "strength")
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_MASK_FIELD_NUMBER: _ClassVar[int]
    BOX_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    RATIOS_FIELD_NUMBER: _ClassVar[int]
    MASK_LEVEL_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_CLICKS_FIELD_NUMBER: _ClassVar[int]
    AUTOMATIC_MASK_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    KEEP_SPECKS_FIELD_NUMBER: _ClassVar[int]
    VIEWS_FIELD_NUMBER: _ClassVar[int]
    EDGE_FIELD_NUMBER: _ClassVar[int]
    REFINE_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    reference: bytes
    reference_mask: bytes
    box: Box
    mask: bytes
    mode: PlacementMode
    ratios: Ratios
    mask_level: MaskLevel
    reference_clicks: _containers.RepeatedCompositeFieldContainer[Point]
    automatic_mask: bool
    prompt: str
    negative_prompt: str
    keep_specks: bool
    views: _containers.RepeatedCompositeFieldContainer[View]
    edge: Edge
    refine: int
    strength: float
    def __init__(self, reference: _Optional[bytes] = ..., reference_mask: _Optional[bytes] = ..., box: _Optional[_Union[Box, _Mapping]] = ..., mask: _Optional[bytes] = ..., mode: _Optional[_Union[PlacementMode, str]] = ..., ratios: _Optional[_Union[Ratios, _Mapping]] = ..., mask_level: _Optional[_Union[MaskLevel, str]] = ..., reference_clicks: _Optional[_Iterable[_Union[Point, _Mapping]]] = ..., automatic_mask: _Optional[bool] = ..., prompt: _Optional[str] = ..., negative_prompt: _Optional[str] = ..., keep_specks: _Optional[bool] = ..., views: _Optional[_Iterable[_Union[View, _Mapping]]] = ..., edge: _Optional[_Union[Edge, str]] = ..., refine: _Optional[int] = ..., strength: _Optional[float] = ...) -> None: ...

class View(_message.Message):
    __slots__ = ("picture", "mask", "clicks", "automatic_mask")
    PICTURE_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    CLICKS_FIELD_NUMBER: _ClassVar[int]
    AUTOMATIC_MASK_FIELD_NUMBER: _ClassVar[int]
    picture: bytes
    mask: bytes
    clicks: _containers.RepeatedCompositeFieldContainer[Point]
    automatic_mask: bool
    def __init__(self, picture: _Optional[bytes] = ..., mask: _Optional[bytes] = ..., clicks: _Optional[_Iterable[_Union[Point, _Mapping]]] = ..., automatic_mask: _Optional[bool] = ...) -> None: ...

class Point(_message.Message):
    __slots__ = ("x", "y", "outside")
    X_FIELD_NUMBER: _ClassVar[int]
    Y_FIELD_NUMBER: _ClassVar[int]
    OUTSIDE_FIELD_NUMBER: _ClassVar[int]
    x: int
    y: int
    outside: bool
    def __init__(self, x: _Optional[int] = ..., y: _Optional[int] = ..., outside: _Optional[bool] = ...) -> None: ...

class Clicks(_message.Message):
    __slots__ = ("points",)
    POINTS_FIELD_NUMBER: _ClassVar[int]
    points: _containers.RepeatedCompositeFieldContainer[Point]
    def __init__(self, points: _Optional[_Iterable[_Union[Point, _Mapping]]] = ...) -> None: ...

class Where(_message.Message):
    __slots__ = ("box", "mask", "clicks")
    BOX_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    CLICKS_FIELD_NUMBER: _ClassVar[int]
    box: Box
    mask: bytes
    clicks: Clicks
    def __init__(self, box: _Optional[_Union[Box, _Mapping]] = ..., mask: _Optional[bytes] = ..., clicks: _Optional[_Union[Clicks, _Mapping]] = ...) -> None: ...

class Box(_message.Message):
    __slots__ = ("x0", "y0", "x1", "y1")
    X0_FIELD_NUMBER: _ClassVar[int]
    Y0_FIELD_NUMBER: _ClassVar[int]
    X1_FIELD_NUMBER: _ClassVar[int]
    Y1_FIELD_NUMBER: _ClassVar[int]
    x0: int
    y0: int
    x1: int
    y1: int
    def __init__(self, x0: _Optional[int] = ..., y0: _Optional[int] = ..., x1: _Optional[int] = ..., y1: _Optional[int] = ...) -> None: ...

class Ratios(_message.Message):
    __slots__ = ("reference", "box", "crop")
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    BOX_FIELD_NUMBER: _ClassVar[int]
    CROP_FIELD_NUMBER: _ClassVar[int]
    reference: float
    box: float
    crop: float
    def __init__(self, reference: _Optional[float] = ..., box: _Optional[float] = ..., crop: _Optional[float] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("steps", "guidance_scale", "control_scale", "eta", "quality", "sampler", "guidance_interval", "map_steps")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    CONTROL_SCALE_FIELD_NUMBER: _ClassVar[int]
    ETA_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    MAP_STEPS_FIELD_NUMBER: _ClassVar[int]
    steps: int
    guidance_scale: float
    control_scale: float
    eta: float
    quality: Quality
    sampler: Sampler
    guidance_interval: TimestepInterval
    map_steps: int
    def __init__(self, steps: _Optional[int] = ..., guidance_scale: _Optional[float] = ..., control_scale: _Optional[float] = ..., eta: _Optional[float] = ..., quality: _Optional[_Union[Quality, str]] = ..., sampler: _Optional[_Union[Sampler, str]] = ..., guidance_interval: _Optional[_Union[TimestepInterval, _Mapping]] = ..., map_steps: _Optional[int] = ...) -> None: ...

class TimestepInterval(_message.Message):
    __slots__ = ("first", "last")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    first: int
    last: int
    def __init__(self, first: _Optional[int] = ..., last: _Optional[int] = ...) -> None: ...

class DrawRequest(_message.Message):
    __slots__ = ("prompt", "negative_prompt", "width", "height", "sampling", "seed", "num_images", "output_format", "model")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    NUM_IMAGES_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    negative_prompt: str
    width: int
    height: int
    sampling: Sampling
    seed: int
    num_images: int
    output_format: ImageFormat
    model: str
    def __init__(self, prompt: _Optional[str] = ..., negative_prompt: _Optional[str] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., seed: _Optional[int] = ..., num_images: _Optional[int] = ..., output_format: _Optional[_Union[ImageFormat, str]] = ..., model: _Optional[str] = ...) -> None: ...

class EditRequest(_message.Message):
    __slots__ = ("scene", "where", "remove", "move", "reshape", "swap", "try_on", "fill", "sampling", "seed", "num_images", "output_format", "model")
    SCENE_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    REMOVE_FIELD_NUMBER: _ClassVar[int]
    MOVE_FIELD_NUMBER: _ClassVar[int]
    RESHAPE_FIELD_NUMBER: _ClassVar[int]
    SWAP_FIELD_NUMBER: _ClassVar[int]
    TRY_ON_FIELD_NUMBER: _ClassVar[int]
    FILL_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    NUM_IMAGES_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    scene: bytes
    where: Where
    remove: Remove
    move: Move
    reshape: Reshape
    swap: Swap
    try_on: Placement
    fill: Fill
    sampling: Sampling
    seed: int
    num_images: int
    output_format: ImageFormat
    model: str
    def __init__(self, scene: _Optional[bytes] = ..., where: _Optional[_Union[Where, _Mapping]] = ..., remove: _Optional[_Union[Remove, _Mapping]] = ..., move: _Optional[_Union[Move, _Mapping]] = ..., reshape: _Optional[_Union[Reshape, _Mapping]] = ..., swap: _Optional[_Union[Swap, _Mapping]] = ..., try_on: _Optional[_Union[Placement, _Mapping]] = ..., fill: _Optional[_Union[Fill, _Mapping]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., seed: _Optional[int] = ..., num_images: _Optional[int] = ..., output_format: _Optional[_Union[ImageFormat, str]] = ..., model: _Optional[str] = ...) -> None: ...

class Remove(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Move(_message.Message):
    __slots__ = ("to", "refine", "strength")
    TO_FIELD_NUMBER: _ClassVar[int]
    REFINE_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    to: Box
    refine: int
    strength: float
    def __init__(self, to: _Optional[_Union[Box, _Mapping]] = ..., refine: _Optional[int] = ..., strength: _Optional[float] = ...) -> None: ...

class Reshape(_message.Message):
    __slots__ = ("to", "refine", "strength")
    TO_FIELD_NUMBER: _ClassVar[int]
    REFINE_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    to: bytes
    refine: int
    strength: float
    def __init__(self, to: _Optional[bytes] = ..., refine: _Optional[int] = ..., strength: _Optional[float] = ...) -> None: ...

class Swap(_message.Message):
    __slots__ = ("placement", "other", "refine", "strength")
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    OTHER_FIELD_NUMBER: _ClassVar[int]
    REFINE_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    placement: Placement
    other: Where
    refine: int
    strength: float
    def __init__(self, placement: _Optional[_Union[Placement, _Mapping]] = ..., other: _Optional[_Union[Where, _Mapping]] = ..., refine: _Optional[int] = ..., strength: _Optional[float] = ...) -> None: ...

class Fill(_message.Message):
    __slots__ = ("prompt", "sampling")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    sampling: Sampling
    def __init__(self, prompt: _Optional[str] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ...) -> None: ...

class EditStreamRequest(_message.Message):
    __slots__ = ("request", "preview_every")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_EVERY_FIELD_NUMBER: _ClassVar[int]
    request: EditRequest
    preview_every: int
    def __init__(self, request: _Optional[_Union[EditRequest, _Mapping]] = ..., preview_every: _Optional[int] = ...) -> None: ...

class SegmentRequest(_message.Message):
    __slots__ = ("picture", "where")
    PICTURE_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    picture: bytes
    where: Where
    def __init__(self, picture: _Optional[bytes] = ..., where: _Optional[_Union[Where, _Mapping]] = ...) -> None: ...

class SegmentResponse(_message.Message):
    __slots__ = ("mask", "request_id", "seconds", "warnings", "score")
    class SecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    MASK_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    mask: bytes
    request_id: str
    seconds: _containers.ScalarMap[str, float]
    warnings: _containers.RepeatedScalarFieldContainer[str]
    score: float
    def __init__(self, mask: _Optional[bytes] = ..., request_id: _Optional[str] = ..., seconds: _Optional[_Mapping[str, float]] = ..., warnings: _Optional[_Iterable[str]] = ..., score: _Optional[float] = ...) -> None: ...

class CompositeResponse(_message.Message):
    __slots__ = ("images", "request_id", "seconds", "warnings", "filler")
    class SecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    FILLER_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedCompositeFieldContainer[CompositeImage]
    request_id: str
    seconds: _containers.ScalarMap[str, float]
    warnings: _containers.RepeatedScalarFieldContainer[str]
    filler: str
    def __init__(self, images: _Optional[_Iterable[_Union[CompositeImage, _Mapping]]] = ..., request_id: _Optional[str] = ..., seconds: _Optional[_Mapping[str, float]] = ..., warnings: _Optional[_Iterable[str]] = ..., filler: _Optional[str] = ...) -> None: ...

class CompositeImage(_message.Message):
    __slots__ = ("image", "seed", "regions")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    image: bytes
    seed: int
    regions: _containers.RepeatedCompositeFieldContainer[Box]
    def __init__(self, image: _Optional[bytes] = ..., seed: _Optional[int] = ..., regions: _Optional[_Iterable[_Union[Box, _Mapping]]] = ...) -> None: ...

class CompositeStreamRequest(_message.Message):
    __slots__ = ("request", "preview_every")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_EVERY_FIELD_NUMBER: _ClassVar[int]
    request: CompositeRequest
    preview_every: int
    def __init__(self, request: _Optional[_Union[CompositeRequest, _Mapping]] = ..., preview_every: _Optional[int] = ...) -> None: ...

class DrawStreamRequest(_message.Message):
    __slots__ = ("request", "preview_every")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_EVERY_FIELD_NUMBER: _ClassVar[int]
    request: DrawRequest
    preview_every: int
    def __init__(self, request: _Optional[_Union[DrawRequest, _Mapping]] = ..., preview_every: _Optional[int] = ...) -> None: ...

class CompositeStreamResponse(_message.Message):
    __slots__ = ("queued", "step_done", "preview", "result", "request_id")
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    STEP_DONE_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    queued: Queued
    step_done: StepDone
    preview: Preview
    result: CompositeResponse
    request_id: str
    def __init__(self, queued: _Optional[_Union[Queued, _Mapping]] = ..., step_done: _Optional[_Union[StepDone, _Mapping]] = ..., preview: _Optional[_Union[Preview, _Mapping]] = ..., result: _Optional[_Union[CompositeResponse, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class Queued(_message.Message):
    __slots__ = ("position",)
    POSITION_FIELD_NUMBER: _ClassVar[int]
    position: int
    def __init__(self, position: _Optional[int] = ...) -> None: ...

class StepDone(_message.Message):
    __slots__ = ("done", "total")
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    done: int
    total: int
    def __init__(self, done: _Optional[int] = ..., total: _Optional[int] = ...) -> None: ...

class Preview(_message.Message):
    __slots__ = ("image_index", "image")
    IMAGE_INDEX_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    image_index: int
    image: bytes
    def __init__(self, image_index: _Optional[int] = ..., image: _Optional[bytes] = ...) -> None: ...

class GetModelInfoRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class GetModelInfoResponse(_message.Message):
    __slots__ = ("version", "checkpoint_sha256", "precision", "backend", "device", "resolution", "max_batch", "limits", "system", "defaults", "condition", "picture_width", "picture_height", "scene_channels", "qualities", "fills", "automatic_masks", "clicks", "filler", "model", "models", "views", "filler_steps")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_SHA256_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    RESOLUTION_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SYSTEM_FIELD_NUMBER: _ClassVar[int]
    DEFAULTS_FIELD_NUMBER: _ClassVar[int]
    CONDITION_FIELD_NUMBER: _ClassVar[int]
    PICTURE_WIDTH_FIELD_NUMBER: _ClassVar[int]
    PICTURE_HEIGHT_FIELD_NUMBER: _ClassVar[int]
    SCENE_CHANNELS_FIELD_NUMBER: _ClassVar[int]
    QUALITIES_FIELD_NUMBER: _ClassVar[int]
    FILLS_FIELD_NUMBER: _ClassVar[int]
    AUTOMATIC_MASKS_FIELD_NUMBER: _ClassVar[int]
    CLICKS_FIELD_NUMBER: _ClassVar[int]
    FILLER_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    VIEWS_FIELD_NUMBER: _ClassVar[int]
    FILLER_STEPS_FIELD_NUMBER: _ClassVar[int]
    version: str
    checkpoint_sha256: str
    precision: str
    backend: str
    device: str
    resolution: int
    max_batch: int
    limits: Limits
    system: str
    defaults: ModelDefaults
    condition: Condition
    picture_width: int
    picture_height: int
    scene_channels: int
    qualities: _containers.RepeatedScalarFieldContainer[Quality]
    fills: bool
    automatic_masks: bool
    clicks: bool
    filler: str
    model: str
    models: _containers.RepeatedScalarFieldContainer[str]
    views: int
    filler_steps: int
    def __init__(self, version: _Optional[str] = ..., checkpoint_sha256: _Optional[str] = ..., precision: _Optional[str] = ..., backend: _Optional[str] = ..., device: _Optional[str] = ..., resolution: _Optional[int] = ..., max_batch: _Optional[int] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., system: _Optional[str] = ..., defaults: _Optional[_Union[ModelDefaults, _Mapping]] = ..., condition: _Optional[_Union[Condition, str]] = ..., picture_width: _Optional[int] = ..., picture_height: _Optional[int] = ..., scene_channels: _Optional[int] = ..., qualities: _Optional[_Iterable[_Union[Quality, str]]] = ..., fills: _Optional[bool] = ..., automatic_masks: _Optional[bool] = ..., clicks: _Optional[bool] = ..., filler: _Optional[str] = ..., model: _Optional[str] = ..., models: _Optional[_Iterable[str]] = ..., views: _Optional[int] = ..., filler_steps: _Optional[int] = ...) -> None: ...

class ModelDefaults(_message.Message):
    __slots__ = ("sampling", "mode", "ratios", "mask_level", "edge", "refine", "strength")
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    RATIOS_FIELD_NUMBER: _ClassVar[int]
    MASK_LEVEL_FIELD_NUMBER: _ClassVar[int]
    EDGE_FIELD_NUMBER: _ClassVar[int]
    REFINE_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    sampling: Sampling
    mode: PlacementMode
    ratios: Ratios
    mask_level: MaskLevel
    edge: Edge
    refine: int
    strength: float
    def __init__(self, sampling: _Optional[_Union[Sampling, _Mapping]] = ..., mode: _Optional[_Union[PlacementMode, str]] = ..., ratios: _Optional[_Union[Ratios, _Mapping]] = ..., mask_level: _Optional[_Union[MaskLevel, str]] = ..., edge: _Optional[_Union[Edge, str]] = ..., refine: _Optional[int] = ..., strength: _Optional[float] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("message_bytes", "pixels", "steps", "images", "placements", "previews")
    MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PIXELS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    PLACEMENTS_FIELD_NUMBER: _ClassVar[int]
    PREVIEWS_FIELD_NUMBER: _ClassVar[int]
    message_bytes: int
    pixels: int
    steps: int
    images: int
    placements: int
    previews: int
    def __init__(self, message_bytes: _Optional[int] = ..., pixels: _Optional[int] = ..., steps: _Optional[int] = ..., images: _Optional[int] = ..., placements: _Optional[int] = ..., previews: _Optional[int] = ...) -> None: ...
