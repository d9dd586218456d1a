"""Reads the data sets of AnyDoor and IMPRINT in their published folder structure, behind one small
interface."""

from training.data.sources.base import Source, SourceError
from training.data.sources.images import (
    DUT,
    LVIS,
    MSRA10K,
    SAM,
    FashionTryon,
    HFlickr,
    MVImgNet,
    VitonHD,
)
from training.data.sources.objects import PPR10K, Objaverse, Stills
from training.data.sources.videos import BURST, MOSE, UVO, VIPSeg, YouTubeVIS, YouTubeVOS

SOURCES: dict[str, type[Source]] = {
    source.__name__: source
    for source in (
        YouTubeVOS,
        YouTubeVIS,
        UVO,
        MOSE,
        VIPSeg,
        BURST,
        MVImgNet,
        VitonHD,
        FashionTryon,
        MSRA10K,
        DUT,
        HFlickr,
        LVIS,
        SAM,
        Stills,
        PPR10K,
        Objaverse,
    )
}
"""Name in a recipe -> reader."""

__all__ = ["SOURCES", "Source", "SourceError"]
