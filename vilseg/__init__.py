"""Open-vocabulary segmentation trained from image-caption pairs alone: the public API."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vilseg.client import Client
    from vilseg.config import RunConfig
    from vilseg.model import ViLSeg
    from vilseg.segmentation.result import Segmentation
    from vilseg.segmentation.segmenter import Segmenter
    from vilseg.text.vocabulary import Vocabulary

__all__ = ["Client", "RunConfig", "Segmentation", "Segmenter", "ViLSeg", "Vocabulary"]

_HOMES = {
    "Client": "vilseg.client",
    "RunConfig": "vilseg.config",
    "Segmentation": "vilseg.segmentation.result",
    "Segmenter": "vilseg.segmentation.segmenter",
    "ViLSeg": "vilseg.model",
    "Vocabulary": "vilseg.text.vocabulary",
}


def __getattr__(name: str) -> object:
    # Importing torch and transformers takes seconds; processes that only read pairs should not pay for it.
    if name not in _HOMES:
        raise AttributeError(f"module 'vilseg' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
