"""How well a model has learned a subject, and what it still knows of the class.

The scores are DreamBooth's (Ruiz et al., CVPR 2023, section 4): likeness of pictures of the subject to real
ones (DINO, CLIP-I) and to their prompts (CLIP-T); likeness of pictures of the *class* to real ones of the
subject (PRES, lower is better: a higher one means that the class has become the subject); difference between
pictures of one prompt (DIV, higher is better).

Without the networks that these are defined by, others take their place, and the scores have names of their
own: the descriptor of `benchmarks.support.identity`, which compares colours and edges and was made for
rendered objects; for DIV also the autoencoder of the model, see `benchmarks.support.feature_distance`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.support.embeddings import Embeddings, pairwise_score
from benchmarks.support.feature_distance import AutoencoderDistance
from benchmarks.support.identity import Gallery, Identity, identity_of
from benchmarks.support.lpips import Lpips
from training.data.pairs import Picture
from training.data.subject import read_pictures

Embed = Callable[[Sequence[Picture]], Embeddings]
EmbedText = Callable[[Sequence[str]], Embeddings]

MIDDLE = 0.6
"""Share of a picture's side that the descriptor looks at: the ground around says nothing of the subject."""


def middle_identity(picture: Picture) -> Identity:
    """Describes what is in the middle of a picture."""
    edges = [round(side * (1 - MIDDLE) / 2) for side in picture.shape[:2]]
    return identity_of(picture[edges[0] : len(picture) - edges[0], edges[1] : picture.shape[1] - edges[1]])


def describe_middles(pictures: Sequence[Picture]) -> Embeddings:
    """Gives unit vectors (N, D) whose products are the similarities of the descriptor."""
    found = [middle_identity(picture) for picture in pictures]
    rows = np.stack([np.concatenate([each.colours, each.edges]) for each in found])
    vectors: Embeddings = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return vectors


@dataclass(frozen=True, eq=False)
class Drawn:
    """Pictures of a checkpoint, and real ones."""

    real: Sequence[Picture]
    """Of the subject."""
    subject: Mapping[str, Sequence[Picture]]
    """Prompt with the subject's name -> what was drawn."""
    of_class: Sequence[Picture]
    said: Mapping[str, str]
    """The same prompts -> without the identifier, which CLIP does not know."""

    @property
    def all_of_subject(self) -> list[Picture]:
        """The pictures of all prompts."""
        return [picture for pictures in self.subject.values() for picture in pictures]

    def likeness(self, embed: Embed) -> float:
        """Returns how alike drawn and real pictures of the subject are: the mean cosine of all pairs."""
        return pairwise_score(embed(self.all_of_subject), embed(self.real))

    def preservation(self, embed: Embed) -> float:
        """Returns how alike pictures of the class are to real ones of the subject; lower is better."""
        return pairwise_score(embed(self.of_class), embed(self.real))

    def obedience(self, embed: Embed, embed_text: EmbedText) -> float:
        """Returns how alike pictures are to their prompts."""
        scores = [
            pairwise_score(embed(pictures), embed_text([self.said[prompt]]))
            for prompt, pictures in self.subject.items()
        ]
        return statistics.fmean(scores)


@dataclass(frozen=True)
class Judges:
    """What scores: the descriptor always, and the networks whose weights were given."""

    dino: Embed | None = None
    clip: Embed | None = None
    clip_text: EmbedText | None = None
    lpips: Lpips | None = None
    autoencoder: AutoencoderDistance | None = None
    gallery: Gallery | None = None
    """Objects that the subject is recognised among."""

    def score(self, drawn: Drawn, number: int = 0) -> dict[str, float]:
        """Scores what a checkpoint has drawn.

        Args:
            drawn: its pictures, and real ones.
            number: of the subject in the gallery.

        Returns:
            Name of the score -> value; DIV only for two pictures of a prompt or more.
        """
        likeness, several = drawn.likeness, all(len(found) > 1 for found in drawn.subject.values())
        found: dict[str, float] = {}
        if self.dino:
            found |= {"DINO": likeness(self.dino), "PRES": drawn.preservation(self.dino)}
        if self.clip:
            found["CLIP-I"] = likeness(self.clip)
        if self.clip and self.clip_text:
            found["CLIP-T"] = drawn.obedience(self.clip, self.clip_text)
        if self.lpips and several:
            found["DIV"] = statistics.fmean(map(self.lpips.diversity, drawn.subject.values()))
        found |= {
            "identity": likeness(describe_middles),
            "PRES by identity": drawn.preservation(describe_middles),
        }
        if several and self.autoencoder:
            found["DIV by autoencoder"] = statistics.fmean(
                map(self.autoencoder.diversity, drawn.subject.values())
            )
        if several:
            found["DIV by identity"] = statistics.fmean(map(difference, drawn.subject.values()))
        if self.gallery:
            found |= {
                "recognised": recognised(self.gallery, drawn.all_of_subject, number),
                "class recognised": recognised(self.gallery, drawn.of_class, number),
            }
        return found


def difference(pictures: Sequence[Picture]) -> float:
    """Returns how different pictures of one prompt are to the descriptor: 1 - the mean cosine of all
    pairs."""
    vectors = describe_middles(pictures)
    upper = np.triu_indices(len(vectors), 1)
    return float(1 - (vectors @ vectors.T)[upper].mean())


def object_gallery(folders: Sequence[Path], resolution: int) -> Gallery:
    """Reads folders of pictures: object n of the gallery is folder n, recognised among all.

    Raises:
        AnyDoorError: a picture cannot be used.
    """
    pictures = {n: read_pictures(folder, resolution) for n, folder in enumerate(folders)}
    views = {n: [middle_identity(picture) for picture in own] for n, own in pictures.items()}
    return Gallery(views, len(views))


def recognised(gallery: Gallery, pictures: Sequence[Picture], number: int) -> float:
    """Returns the share of pictures that the descriptor finds more like object `number` than like any
    other."""
    return statistics.fmean(
        gallery.recognised(middle_identity(picture), number)["identity"] for picture in pictures
    )
