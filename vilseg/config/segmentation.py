"""Inference settings: a part of the run configuration that travels with a model."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from vilseg.config.base import ConfigPart, Fraction, NonNegative, NonNegativeInt, Positive, PositiveInt
from vilseg.text.prompt_templates import resolve_templates


class RefinementConfig(ConfigPart):
    """Scores brought along the image's edges; see ``vilseg.segmentation.refinement``."""

    method: Literal["pamr", "guided"] = "pamr"
    """Means of like neighbours (PAMR, Araslanov & Roth 2020, section 3.3), or a guided filter (He, Sun & Tang 2013)."""
    iterations: NonNegativeInt = 0
    """0 switches it off, as ViL-Seg has none; the authors of PAMR use 10, those of the guided filter 1."""
    dilations: Annotated[list[PositiveInt], Field(min_length=1)] = [1, 2, 4, 8]
    """Distances of the neighbours in pixels of the enlarged patch grid (PAMR, six up to 24, on pixels of the image)."""
    radius: PositiveInt = 2
    """Radius of the guided filter's windows, in patches."""
    upscale: PositiveInt = 4
    """Pixels a side that every patch becomes, as long as the image has as many; more cost more and gain little."""
    tolerance: Positive = 0.1
    """Colour difference, in local standard deviations, that weakens a neighbour by a factor e (0.1 in the implementation of
    PAMR's authors); of the guided filter, contrast in standard deviations of the whole image that is no edge. Larger values
    forgive noise and leave fewer specks."""


class SegmentationConfig(ConfigPart):
    """Inference settings of a trained model; they are saved in the model folder.

    The defaults are the paper's: regions of the clustering head, named by the nearest class name. See
    ``vilseg.segmentation.class_scores`` for the formulas.
    """

    input_size: PositiveInt = 224
    """Shorter side in pixels that images are resized to before encoding."""
    window: PositiveInt | None = None
    """Side in pixels of the sliding window for images that are larger after resizing, where the encoder was trained on images of
    that size or memory is short; null encodes the image in one pass. See ``vilseg.segmentation.dense_features``."""
    overlap: NonNegativeInt | None = None
    """Pixels that neighbouring windows share, at most half a window; null is a quarter."""
    attention: Literal["plain", "sclip", "naclip"] = "plain"
    """Attention of the image encoder's last block where patches are classified: its own, or one of two under which a patch
    attends to those like itself (SCLIP, Wang et al. 2023; NACLIP, Hajimiri et al. 2024; ``vilseg.model.correlated_attention``).
    Clusters, the embedding of the whole image and recorded statistics always use the plain one."""
    max_aspect: Positive = 4.0
    """Longer images are squeezed to this ratio of sides, so that one strip cannot exhaust the memory."""
    region_weight: Fraction = 1.0
    """1 names regions only, as in the paper; 0 names every patch by itself; between blends the two scores."""
    image_mix: Fraction = 0.0
    """Fraction of the image's mean embedding mixed into every region's and patch's."""
    calibration: Fraction = 0.0
    """Strength, 0 to 1, of standardizing each class's cosines by their mean and spread over patches of training images."""
    refinement: RefinementConfig = RefinementConfig()
    temperature: Positive = 0.05
    """Soft-max over classes that turns cosines into scores."""
    prompts: Annotated[list[str], Field(min_length=1)] = ["a photo of a {}."]
    """``{}`` is the class name; the embeddings of all prompts are averaged (CLIP, section 3.1.4). ``clip`` stands for CLIP's 80
    templates, ``short`` for the 7 that its authors selected from them. A vocabulary that has prompts takes its own."""
    synonyms: Literal["max", "mean", "logsumexp"] = "max"
    """The score of a class with several names: that of the one that fits best, their mean, or in between
    temperature log mean_s exp(s / temperature), which leans to the best the more it stands out."""
    center_text: bool = False
    """Subtract the mean caption embedding that training recorded from the texts' embeddings before comparing."""
    background_words: list[str] = []
    """Other things that an image may hold besides the classes asked for: ``background`` takes the best of their scores. If empty,
    the word background itself is compared. Words that are class names are left out. Used only if there is such a class."""
    background_bias: float = 0.0
    """Added to the cosine of the class ``background``."""
    objectness: NonNegative = 0.0
    """Added to it where a region runs along the image's border, and subtracted where it keeps away from it, as objects do. Not
    of GeoTIFFs, which are never seen as a whole."""
    gate: PositiveInt | None = None
    """Only so many classes are kept in an image, ``background`` not counted: those with the highest scores at their best place.
    Hundreds of classes then do not appear in an image that shows five. Each frame of a video is an image of its own; GeoTIFFs,
    which are never seen as a whole, are not gated."""
    threshold: Fraction = 0.0
    """Pixels of lower scores are no class, or ``background`` where there is such a class: the answer "unknown"."""

    @model_validator(mode="after")
    def _overlap_fits(self) -> Self:
        if self.window is not None and self.overlap is not None and 2 * self.overlap > self.window:
            raise ValueError(
                f"windows of {self.window} pixels cannot overlap by {self.overlap}; at most {self.window // 2}"
            )
        return self

    @field_validator("prompts", mode="before")
    @classmethod
    def _named_set(cls, prompts: Any) -> Any:
        return list(resolve_templates(prompts)) if isinstance(prompts, str) else prompts

    @field_validator("prompts")
    @classmethod
    def _prompts_hold_the_name(cls, prompts: list[str]) -> list[str]:
        return list(resolve_templates(prompts))
