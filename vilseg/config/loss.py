"""Configuration of the training losses and their weights."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from vilseg.config.base import ConfigPart, Fraction, NonNegative, NonNegativeInt, Positive, PositiveInt


class CrossModalConfig(ConfigPart):
    """Contrastive loss between images and captions (InfoNCE; CLIP, Radford et al. 2021)."""

    weight: NonNegative = 1.0
    form: Literal["infonce", "sigmoid"] = "infonce"
    """``infonce`` is a soft-max over the batch. ``sigmoid`` is a binary classification of every image-caption combination with a
    learnt bias that starts at -10 (SigLIP, Zhai et al. 2023, section 3.2). Both apply to global and pooled patch embeddings."""
    temperature: Positive = 0.07
    """Initial value of the learnt temperature, whose inverse is limited to 100 (CLIP, section 2.5). The default is 0.1 if
    ``form`` is sigmoid (t' = log 10, SigLIP, section 3.2)."""
    patch_share: Fraction = 0.5
    """Weight, 0 to 1, of the loss on pooled patch embeddings; the loss on the global embedding has the remaining weight."""
    patch_pooling: Literal["mean", "softmax"] = "softmax"
    """Pooling of an image's patches for a caption: their mean, or a mean weighted by a soft-max of their similarities to the
    caption."""
    pooling_temperature: Positive = 0.1
    """Temperature of the soft-max of ``patch_pooling``."""

    @model_validator(mode="before")
    @classmethod
    def _start_of_the_form(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("form") == "sigmoid" and "temperature" not in values:
            return {**values, "temperature": 0.1}
        return values


class NounsConfig(ConfigPart):
    """Multi-label loss between images and the noun phrases of their captions."""

    weight: NonNegative = 1.0
    top_patches: PositiveInt = 8
    """Number of best patches over whose scores the mean is taken as an image's score for a phrase."""
    finder: Literal["tagger", "statistics"] = "tagger"
    """Method of finding phrases. ``tagger`` is a part-of-speech tagger for English. ``statistics`` uses the captions alone, for
    any language with spaces between words; it finds topical words, including verbs and adjectives, and treats every inflected
    form as a separate word. See ``vilseg.text.phrase_statistics``."""
    max_phrases: PositiveInt = 2000
    """Maximum number of phrases; the most frequent are kept."""
    min_count: PositiveInt = 10
    """Minimum number of sampled captions that contain a phrase; rarer phrases are left out."""


class VisionConfig(ConfigPart):
    """Self-supervised loss between local and global crops with an EMA teacher (DINO, Caron et al. 2021).

    The defaults are those of section 3.2 and the appendix of that paper, unless stated otherwise.
    """

    weight: NonNegative = 0.1
    form: Literal["dino", "infonce"] = "dino"
    """``dino`` compares the distributions of student and teacher over prototypes. ``infonce`` is a soft-max over the images of
    the batch that identifies the teacher's view of the same image (InfoNCE, van den Oord et al. 2018, with a momentum encoder as
    in MoCo, He et al. 2020, section 3.2); it uses ``student_temperature`` and no prototypes, centre or teacher temperature."""
    student_temperature: Positive = 0.1
    teacher_temperature: Positive = 0.04
    center_momentum: Fraction = 0.9
    teacher_momentum: Fraction = 0.996
    """Initial decay rate of the teacher's moving average; it rises to 1 on a cosine schedule over the run."""
    prototypes: PositiveInt = 256
    """Number of outputs of the projection head (65,536 in DINO; fewer for small data)."""
    hidden_dim: PositiveInt = 256


class MutualInformationConfig(ConfigPart):
    """IIC loss: mutual information between the cluster assignments of two views (Ji et al. 2019, equations 3 and 5)."""

    weight: NonNegative = 0.1
    entropy_weight: Annotated[float, Field(ge=1)] = 1.5
    """Weight of the marginal entropies: 1 as in IIC, larger values (up to 1.5) prevent collapse to few clusters."""
    radius: NonNegativeInt = 1
    """Maximum displacement in patches, in each direction; the loss is averaged over all displacements (IIC, section 3.3)."""
    train_encoder: bool = True
    """If true, the gradient also trains the image encoder; otherwise it trains the clustering head alone."""
    overclusters: Annotated[int, Field(ge=0, le=4096)] = 0
    """Number of outputs of a second clustering head, trained with the same loss and not saved in the model ("auxiliary
    overclustering", IIC); 0 for none."""

    @field_validator("overclusters")
    @classmethod
    def _no_single_cluster(cls, overclusters: int) -> int:
        if overclusters == 1:
            raise ValueError("a single cluster holds no information; give 0 for no second head, or at least 2")
        return overclusters


class SelfTrainingConfig(ConfigPart):
    """Cross-entropy with pseudo-labels of patches from the initial model; used only with ``stage: self-train``.

    See ``vilseg.training.pseudo_labels``.
    """

    weight: NonNegative = 0.3
    confidence: float = 2.0
    """Minimum score for a label, in standard deviations above the phrase's mean score; other patches have no label."""


class LossConfig(ConfigPart):
    """The four losses of training, and the loss of self-training; weight 0 switches a loss off and skips its computation."""

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
