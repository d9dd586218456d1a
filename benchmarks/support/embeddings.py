"""DINO-score and CLIP-score, as DreamBooth defines them: how similar networks find pictures of an object.

`load_clip_text` is for the likeness of pictures to prompts, CLIP-T.

Both are the average cosine between the embeddings of generated and of real pictures of one object, over all
such pairs: DINO's class token (ViT-S/16) and CLIP's image embedding (ViT-B/32). The weights are read from
local folders in the format of transformers; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from engines.errors import AnyDoorError

Picture = NDArray[np.uint8]
Embeddings = NDArray[np.float64]

_BATCH = 16


class Embedder:
    """A network that turns pictures into unit vectors."""

    def __init__(self, name: str, model: Any, processor: Any, read: Callable[[Any], torch.Tensor]) -> None:
        self.name = name
        self._model, self._processor, self._read = model.eval(), processor, read

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Picture]) -> Embeddings:
        """Return unit vectors (N, D) of pictures (H, W, 3) uint8 of any sizes."""
        rows: list[Embeddings] = []
        for start in range(0, len(pictures), _BATCH):
            images = [Image.fromarray(picture) for picture in pictures[start : start + _BATCH]]
            pixels = self._processor(images=images, return_tensors="pt")["pixel_values"]
            vectors = self._read(self._model(pixel_values=pixels)).double()
            rows.append((vectors / vectors.norm(dim=-1, keepdim=True)).numpy())
        return np.concatenate(rows)


def load_dino(folder: Path) -> Embedder:
    """Load DINO from a folder like that of facebook/dino-vits16.

    Raises:
        AnyDoorError: the folder does not hold such a model.
    """
    from transformers import ViTModel

    return _load("DINO", "vit", ViTModel, folder, lambda out: out.last_hidden_state[:, 0], pooler=False)


def load_clip(folder: Path) -> Embedder:
    """Load CLIP's image encoder from a folder like that of openai/clip-vit-base-patch32.

    Raises:
        AnyDoorError: the folder does not hold such a model.
    """
    from transformers import CLIPVisionModelWithProjection

    return _load("CLIP", "clip", CLIPVisionModelWithProjection, folder, lambda out: out.image_embeds)


def load_clip_text(folder: Path) -> Callable[[Sequence[str]], Embeddings]:
    """Load CLIP's text encoder from the same folder: prompts -> unit vectors (N, D).

    Raises:
        AnyDoorError: the folder does not hold such a model.
    """
    from transformers import CLIPTextModelWithProjection, CLIPTokenizerFast

    try:
        tokenizer = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
        model = CLIPTextModelWithProjection.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise AnyDoorError(f"cannot read CLIP's text encoder from '{folder}': {error}") from error

    @torch.no_grad()
    def embed(prompts: Sequence[str]) -> Embeddings:
        tokens = tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        vectors = model(**tokens).text_embeds.double()
        found: Embeddings = (vectors / vectors.norm(dim=-1, keepdim=True)).numpy()
        return found

    return embed


def _load(
    name: str,
    kind: str,
    model_class: Any,
    folder: Path,
    read: Callable[[Any], torch.Tensor],
    pooler: bool | None = None,
) -> Embedder:
    model, processor = load_network(name, kind, model_class, folder, pooler)
    return Embedder(name, model, processor, read)


def load_network(
    name: str, kind: str, model_class: Any, folder: Path, pooler: bool | None = None
) -> tuple[Any, Any]:
    """Load a model of transformers, and its processor of pictures, from a folder.

    Args:
        name: of the network, for people.
        kind: its `model_type`.
        model_class: its class in transformers.
        folder: where it is.
        pooler: whether it has a pooling layer, where that can be chosen.

    Raises:
        AnyDoorError: the folder does not hold such a model.
    """
    from transformers import AutoConfig, AutoImageProcessor, logging

    if not (folder / "config.json").is_file():
        raise AnyDoorError(f"'{folder}' is not a {name} folder: there is no config.json in it")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # missing weights are reported below
    try:
        found = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        if found != kind:
            raise AnyDoorError(f"'{folder}' holds a model of the type '{found}'; {name} is a '{kind}'")
        options = {} if pooler is None else {"add_pooling_layer": pooler}
        model, loading = model_class.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **options
        )
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise AnyDoorError(
            f"cannot read {name} from '{folder}': {str(error).strip().splitlines()[0]}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    if loading["missing_keys"]:
        raise AnyDoorError(
            f"the weights in '{folder}' lack {sorted(loading['missing_keys'])[0]} and maybe more"
        )
    return model.eval(), processor


def pairwise_score(generated: Embeddings, real: Embeddings) -> float:
    """Return the mean cosine over all pairs of a generated (N, D) and a real (M, D) unit vector."""
    return float((generated @ real.T).mean())
