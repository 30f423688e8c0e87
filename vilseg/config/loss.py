"""Weights and settings of the training losses: a part of the run configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from vilseg.config.base import ConfigPart, Fraction, NonNegative, NonNegativeInt, Positive, PositiveInt


class CrossModalConfig(ConfigPart):
    """Image-caption contrast (InfoNCE; CLIP, Radford et al. 2021)."""

    weight: NonNegative = 1.0
    form: Literal["infonce", "sigmoid"] = "infonce"
    """Soft-max over the batch, or every pair judged by itself with a learnt bias that starts at -10 (SigLIP, Zhai et al. 2023,
    section 3.2); for the global and the pooled patch embeddings alike."""
    temperature: Positive = 0.07
    """Start of the learnt temperature; its inverse is capped at 100 (CLIP, section 2.5). 0.1 where ``form`` is sigmoid and
    nothing is set (t' = log 10, SigLIP, section 3.2)."""
    patch_share: Fraction = 0.5
    """Fraction of the loss that is taken on pooled patch embeddings, the rest on the global embedding; DESIGN: half and half."""
    patch_pooling: Literal["mean", "softmax"] = "softmax"
    """Pooling of patches against a caption: their mean, or weighted by a soft-max of their similarity with it."""
    pooling_temperature: Positive = 0.1

    @model_validator(mode="before")
    @classmethod
    def _start_of_the_form(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("form") == "sigmoid" and "temperature" not in values:
            return {**values, "temperature": 0.1}
        return values


class NounsConfig(ConfigPart):
    """Multi-label contrast with the noun phrases of the captions."""

    weight: NonNegative = 1.0
    top_patches: PositiveInt = 8
    """An image's score for a phrase is the mean over its best patches."""
    finder: Literal["tagger", "statistics"] = "tagger"
    """A part-of-speech tagger (English), or statistics of the captions alone for any language that parts words by spaces: they
    find topical words, verbs and adjectives among them, and take every inflection for a word of its own; see
    ``vilseg.text.phrase_statistics``."""
    max_phrases: PositiveInt = 2000
    min_count: PositiveInt = 10
    """Phrases rarer than this in the captions sampled are left out."""


class VisionConfig(ConfigPart):
    """Local against global crops with an EMA teacher (DINO, Caron et al. 2021; defaults of its section 3.2 and appendix)."""

    weight: NonNegative = 0.1
    form: Literal["dino", "infonce"] = "dino"
    """Agreement over prototypes, or a soft-max over the images of the batch: a student's view must find the teacher's view of
    the same image (InfoNCE, van den Oord et al. 2018, with a momentum encoder as in MoCo, He et al. 2020, section 3.2).
    ``infonce`` takes ``student_temperature`` and has neither prototypes, centre nor teacher temperature."""
    student_temperature: Positive = 0.1
    teacher_temperature: Positive = 0.04
    center_momentum: Fraction = 0.9
    teacher_momentum: Fraction = 0.996
    """Rises to 1 by a cosine over the run."""
    prototypes: PositiveInt = 256
    """Outputs of the projection head (65,536 in DINO; fewer for small data)."""
    hidden_dim: PositiveInt = 256


class MutualInformationConfig(ConfigPart):
    """Mutual information between cluster assignments of two views (IIC, Ji et al. 2019, equations 3 and 5)."""

    weight: NonNegative = 0.1
    entropy_weight: Annotated[float, Field(ge=1)] = 1.5
    """Weight of the marginal entropies, 1 as in IIC up to 1.5 against collapse."""
    radius: NonNegativeInt = 1
    """Displacements of up to this many patches in each direction are averaged (IIC, section 3.3)."""
    train_encoder: bool = True
    """Let the gradient go on into the image encoder; otherwise the head alone learns from it."""
    overclusters: Annotated[int, Field(ge=0, le=4096)] = 0
    """Outputs of a second head that learns by the same loss beside the first and is dropped from the model; 0 for none
    ("auxiliary overclustering", IIC)."""

    @field_validator("overclusters")
    @classmethod
    def _no_single_cluster(cls, overclusters: int) -> int:
        if overclusters == 1:
            raise ValueError("a single cluster holds no information; give 0 for no second head, or at least 2")
        return overclusters


class SelfTrainingConfig(ConfigPart):
    """Cross-entropy with labels that the model itself gave to patches; of ``stage: self-train`` alone. See
    ``vilseg.training.pseudo_labels``."""

    weight: NonNegative = 0.3
    confidence: float = 2.0
    """A patch has a label where its score is so many standard deviations above what is usual for the phrase."""


class LossConfig(ConfigPart):
    """The four losses, and that of self-training; weight 0 switches one off and saves its work."""

    cross_modal: CrossModalConfig = CrossModalConfig()
    nouns: NounsConfig = NounsConfig()
    vision: VisionConfig = VisionConfig()
    mutual_information: MutualInformationConfig = MutualInformationConfig()
    self_training: SelfTrainingConfig = SelfTrainingConfig()

    @model_validator(mode="after")
    def _some_loss(self) -> Self:
        if not any((self.cross_modal.weight, self.nouns.weight, self.vision.weight, self.mutual_information.weight)):
            raise ValueError("all four weights are 0; at least one loss is needed")
        return self
