"""Configuration of inference, which is saved with the model."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from vilseg.config.base import ConfigPart, Fraction, NonNegative, NonNegativeInt, Positive, PositiveInt
from vilseg.text.prompt_templates import resolve_templates


class RefinementConfig(ConfigPart):
    """Refinement of class scores along the edges of the image; see ``vilseg.segmentation.refinement``."""

    method: Literal["pamr", "guided"] = "pamr"
    """Weighted means over neighbours of similar colour (PAMR, Araslanov & Roth 2020, section 3.3), or a guided filter (He, Sun &
    Tang 2013)."""
    iterations: NonNegativeInt = 0
    """Number of iterations; 0 switches refinement off, as in ViL-Seg. The authors of PAMR use 10, those of the guided filter
    1."""
    dilations: Annotated[list[PositiveInt], Field(min_length=1)] = [1, 2, 4, 8]
    """Distances of the neighbours for ``pamr``, in pixels of the upscaled patch grid. (The PAMR authors use six distances up to
    24 pixels of the image.)"""
    radius: PositiveInt = 2
    """Radius of the windows of the guided filter, in patches."""
    upscale: PositiveInt = 4
    """Side in pixels to which each patch is upscaled; the result is never larger than the image. Larger values cost more and
    improve little."""
    tolerance: Positive = 0.1
    """Tolerated colour difference. For ``pamr``, the difference in local standard deviations that reduces a neighbour's weight by
    a factor e (0.1 in the implementation of PAMR's authors). For ``guided``, the contrast, in standard deviations of the whole
    image, up to which there is no edge. Larger values tolerate more noise and leave fewer specks."""


class SegmentationConfig(ConfigPart):
    """Inference settings of a trained model, saved in the model folder.

    The defaults follow the ViL-Seg paper: regions come from the clustering head, and each gets the class whose name is most
    similar. See ``vilseg.segmentation.class_scores`` for the formulas.
    """

    input_size: PositiveInt = 224
    """Length in pixels to which the shorter side of an image is resized before encoding."""
    window: PositiveInt | None = None
    """Side in pixels of the sliding window for images that are larger than it after resizing; null encodes an image in one pass.
    Use a window if the encoder was trained on images of that size, or to save memory. See
    ``vilseg.segmentation.dense_features``."""
    overlap: NonNegativeInt | None = None
    """Overlap of neighbouring windows in pixels, at most half of ``window``; null means a quarter of it."""
    attention: Literal["plain", "sclip", "naclip"] = "plain"
    """Attention in the image encoder's last block for the patch embeddings that are compared with classes. ``plain`` is the
    encoder's own; with ``sclip`` and ``naclip`` a patch attends to similar patches (SCLIP, Wang et al. 2023; NACLIP, Hajimiri et
    al. 2024; ``vilseg.model.correlated_attention``). Clusters, the embedding of the whole image and the recorded statistics
    always use ``plain``."""
    max_aspect: Positive = 4.0
    """Maximum ratio of the longer to the shorter side. Longer images are squeezed to it, because they could exhaust the
    memory."""
    region_weight: Fraction = 1.0
    """Weight of region scores against patch scores: 1 classifies regions only, as in the paper, 0 classifies every patch
    separately, and values between blend the two scores."""
    image_mix: Fraction = 0.0
    """Weight of the image's mean embedding when it is mixed into the embedding of every region and patch."""
    calibration: Fraction = 0.0
    """Strength, 0 to 1, with which each class's cosines are standardized by their mean and standard deviation over patches of
    training images."""
    refinement: RefinementConfig = RefinementConfig()
    temperature: Positive = 0.05
    """Temperature of the soft-max over classes that turns cosine similarities into scores."""
    prompts: Annotated[list[str], Field(min_length=1)] = ["a photo of a {}."]
    """Templates in which ``{}`` is replaced by the class name; the embeddings of all prompts are averaged (CLIP, section 3.1.4).
    ``clip`` is the set of CLIP's 80 templates, ``short`` the 7 that its authors selected from them. Prompts of the vocabulary
    replace these."""
    synonyms: Literal["max", "mean", "logsumexp"] = "max"
    """Score of a class with several names: the maximum or the mean of the scores s of its names, or temperature log mean_s exp(s
    / temperature), which lies between them and is close to the maximum if one name scores far higher."""
    center_text: bool = False
    """If true, subtract the mean caption embedding, recorded in training, from the class embeddings before they are compared."""
    background_words: list[str] = []
    """Names of other things that an image may contain besides the requested classes; the class ``background`` gets the highest of
    their scores. If empty, the word background itself is used. Words that are class names are left out. Used only if there is a
    class ``background``."""
    background_bias: float = 0.0
    """Constant added to the cosine similarity of the class ``background``."""
    objectness: NonNegative = 0.0
    """Value added to the cosine similarity of the class ``background`` in regions along the image's border, and subtracted from
    it in regions away from the border, which are more likely objects. Not applied to GeoTIFFs, because they are processed in
    windows."""
    gate: PositiveInt | None = None
    """Maximum number of classes in the result of one image, not counting ``background``; null is no limit. The classes with the
    highest score at any position are kept, which removes spurious classes if the vocabulary is large. Each frame of a video
    counts as one image. Not applied to GeoTIFFs, because they are processed in windows."""
    threshold: Fraction = 0.0
    """Minimum score of a pixel; a pixel below it gets the class ``background``, or no class if there is no such class."""

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
