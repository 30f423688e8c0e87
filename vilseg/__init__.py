"""Open-vocabulary segmentation trained from image-caption pairs alone: the public API."""

from vilseg.config import RunConfig
from vilseg.model import ViLSeg
from vilseg.segmentation.result import Segmentation
from vilseg.segmentation.segmenter import Segmenter
from vilseg.text.vocabulary import Vocabulary

__all__ = ["RunConfig", "Segmentation", "Segmenter", "ViLSeg", "Vocabulary"]
