"""Trains a small segmenter: a U-Net that finds the main object, on the exact masks of rendered pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from training.loop import Batch, NumberedDataset
from training.network.segmenter import Segmenter, SegmenterArchitecture, overlap


class SegmenterTask:
    """Cross entropy of each pixel, and one minus the overlap of each mask."""

    def __init__(self, architecture: SegmenterArchitecture, samples: NumberedDataset) -> None:
        """Builds the network, and takes the samples that it learns from; see `CutOuts`."""
        torch.manual_seed(0)
        self.module = self.network = Segmenter(architecture)
        self._samples = samples

    def dataset(self) -> NumberedDataset:
        """Gives the samples."""
        return self._samples

    def loss(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Computes the loss; also shows the mean overlap of the masks as they are used."""
        logits, truth = module(batch["picture"]).float(), batch["mask"]
        entropy = F.binary_cross_entropy_with_logits(logits, truth)
        soft = 1 - overlap(logits.sigmoid(), truth).mean()
        found = overlap((logits.detach() > 0).float(), (truth > 0.5).float()).mean()
        return {"loss": entropy + soft, "entropy": entropy.detach(), "overlap": found}
