"""The run configuration: one tree of small parts, each handed alone to the component that it configures.

A configuration is a YAML file plus ``key.sub=value`` overrides. A default's docstring names its source; where it names none
the value is ours. An unknown key is an error that names the nearest right one. The resolved tree is saved beside every run.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from vilseg.config.base import (
    ConfigPart,
    ConfigTree,
    Fraction,
    FractionBelowOne,
    FractionRange,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
)
from vilseg.config.data import DataConfig
from vilseg.config.loss import LossConfig
from vilseg.errors import ConfigError
from vilseg.text.prompt_templates import resolve_templates


class ViewsConfig(ConfigPart):
    """Augmented views of an image. Crop scales are shares of the area (DINO, Caron et al. 2021, section 3.2)."""

    global_size: PositiveInt = 224
    global_scale: FractionRange = (0.4, 1.0)
    local_size: PositiveInt = 96
    local_crops: NonNegativeInt = 2
    local_scale: FractionRange = (0.05, 0.4)
    flip: Fraction = 0.5
    brightness: Fraction = 0.3
    contrast: Fraction = 0.3
    saturation: Fraction = 0.2
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.03
    """Largest photometric change, as a factor around 1 (hue: share of the circle)."""
    feature_dropout: FractionBelowOne = 0.0
    """Share of a frozen encoder's channels dropped for a whole view; with a feature cache it is what makes two views."""


class ImageEncoderConfig(ConfigPart):
    """One of ``checkpoint``, ``factory``, or sizes for a network from scratch."""

    checkpoint: str | None = None
    """Folder, ``s3://`` URI or hub id of a Hugging Face vision model (its Auto class decides: ViT, DINOv2, CLIP, ConvNeXt …)."""
    factory: str | None = None
    """Import path ``module:function``; called with ``factory_options`` it returns a module with patch features."""
    factory_options: dict[str, Any] = {}
    architecture: str = "local_conv"
    """From scratch: ``local_conv`` (ours, with a small receptive field) or any ``model_type`` of transformers (``vit`` …)."""
    sizes: dict[str, Any] = {}
    """From scratch: arguments of the architecture (``local_conv``: width, depth, patch_size, kernel; others: their HF config)."""
    head: bool = False
    """Take the tokens of a CLIP, SigLIP or SigLIP 2 tower after its own head (last norm, attention pooling), as its text tower
    met them; without, the last hidden state. ``model.init`` sets it."""
    frozen: bool = False
    """Keep the encoder as it is and train only what comes after it (LiT, Zhai et al. 2022)."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.checkpoint and self.factory:
            raise ValueError("give either 'checkpoint' or 'factory', not both")
        return self


class TextEncoderConfig(ConfigPart):
    """A Hugging Face text model with its tokenizer, or a small one whose tokenizer is trained on the pairs' own captions."""

    checkpoint: str | None = None
    architecture: str = "bert"
    sizes: dict[str, Any] = {}
    """From scratch: keys of the architecture's Hugging Face configuration; for ``bert`` what is left out is small:
    hidden_size 128, num_hidden_layers 2, num_attention_heads 4, intermediate_size 512, and no dropout."""
    vocabulary_size: PositiveInt = 8192
    """Word pieces of the tokenizer trained from captions."""
    max_tokens: PositiveInt = 77
    """Longer captions are cut (77 as in CLIP)."""
    pooling: Literal["mean", "first", "pooler"] = "mean"
    """Sentence embedding: mean of the tokens (Sentence-BERT), the first token (BERT), or the model's own pooled output (CLIP)."""
    projection: Literal["linear", "identity"] = "linear"
    """``identity`` keeps the text space of a good sentence encoder and lets the images come to it."""
    frozen: bool = False


class ModelConfig(ConfigPart):
    """Both towers and the clustering head."""

    init: str | None = None
    """Start from a whole model, towers, projections and scale: folder, ``s3://`` URI or hub id of CLIP, SigLIP or SigLIP 2
    (Hugging Face), or a vilseg model folder. It decides the other keys of this part, all but ``frozen`` (and ``clusters``
    where it has no clustering head): leave them at their defaults."""
    image_encoder: ImageEncoderConfig = ImageEncoderConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    embedding_dim: PositiveInt = 512
    """Shared space of images and texts (512 as CLIP ViT-B/16); the text model's own width with ``identity`` projection."""
    clusters: Annotated[int, Field(ge=2, le=1024)] = 25
    """Outputs of the clustering head; ViL-Seg compares 5 to 35."""


class OptimizerConfig(ConfigPart):
    """AdamW with linear warm-up and linear decay to zero (Bergsma et al. 2025)."""

    learning_rate: Positive = 5e-4
    weight_decay: NonNegative = 0.05
    betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.98)
    """As CLIP for vision transformers (Radford et al. 2021, table 20)."""
    warmup_steps: NonNegativeInt = 100
    gradient_clip: NonNegative = 1.0
    """Largest norm of the gradient; 0 leaves it alone."""


class TrainerConfig(ConfigPart):
    """Workers, steps and what is kept."""

    workers: int | tuple[int, int] = 1
    """Processes that share every step; ``[1, 4]`` takes as many as the cluster has room for, and goes on with fewer where a
    machine is lost and with more where one comes."""
    batch_size: PositiveInt = 256
    """Pairs a step over all workers."""
    steps: PositiveInt = 10_000
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16 autocasts the networks; losses are always float32. ``auto`` takes it where there are matrix units for it."""
    sharding: Literal["none", "fsdp"] = "none"
    """``fsdp`` cuts weights, gradients and optimiser states among the workers (FSDP, Zhao et al. 2023) where ``none`` gives
    each a whole copy: the same losses, less memory, more traffic. A run may change it when it is resumed. With ``fsdp`` there
    are neither figures on held-out pairs nor pictures of clusters on the way."""
    chunk_size: PositiveInt | None = None
    """Pairs a forward pass of a worker; null takes its whole share at once. The gradient is that of the whole batch in either
    case, in the memory of one chunk and at the price of a second forward pass (GradCache, Gao et al. 2021)."""
    checkpoint_activations: bool = False
    """Keep only what goes into the blocks of the encoders and compute the rest again in the backward pass (Chen et al. 2016):
    less memory, about a third more work."""
    compile: bool = False
    """Compile the encoders by ``torch.compile``; needs a C++ compiler on every worker."""
    checkpoint_every: PositiveInt = 500
    keep_checkpoints: PositiveInt | None = 2
    """The newest so many, and the best one beside them; null keeps all."""
    best_by: str = "loss"
    """Figure of the reports by which the best checkpoint is known: of names that begin with ``loss`` the lowest, of others the
    highest. With ``data.held_out`` there are ``held_out/retrieval``, ``held_out/nouns`` and more (docs/tuning.md)."""
    log_every: PositiveInt = 20
    max_failures: NonNegativeInt = 2
    """A worker that dies is replaced this often before the run fails."""
    seed: NonNegativeInt = 0
    storage: str = "runs"
    """URI under which the run's folder is made."""
    examples_every: NonNegativeInt = 500
    """Steps between pictures of the clusters in TensorBoard; 0 for none."""
    tracking: Literal["none", "mlflow"] = "none"
    """``mlflow`` tells the server at ``MLFLOW_TRACKING_URI`` of every report too."""
    mlflow_experiment: str = "vilseg"

    @field_validator("workers")
    @classmethod
    def _some_worker(cls, workers: int | tuple[int, int]) -> int | tuple[int, int]:
        fewest, most = (workers, workers) if isinstance(workers, int) else workers
        if fewest < 1:
            raise ValueError("training needs at least 1 worker")
        if fewest > most:
            raise ValueError(f"the fewest workers, {fewest}, are more than the most, {most}")
        return workers

    @model_validator(mode="after")
    def _whole_or_chunks(self) -> Self:
        if self.sharding == "fsdp" and self.chunk_size is not None:
            raise ValueError("chunk_size needs whole weights; set sharding=none or chunk_size=null")
        return self

    @property
    def min_workers(self) -> int:
        """Workers that training does not begin without."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """Workers that training never has more of."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    def check_even_split(self) -> None:
        """Raise ConfigError where a step's pairs cannot be shared evenly.

        Not a part of validation: that there are too few CPUs for so many workers is the better thing to say first.
        """
        fewest = self.min_workers
        if self.batch_size % fewest and self.max_even_workers(self.max_workers) < fewest:
            raise ConfigError(
                f"trainer.batch_size {self.batch_size} cannot be shared evenly by {fewest} workers; "
                f"the nearest that can is {max(1, round(self.batch_size / fewest)) * fewest}"
            )

    def max_even_workers(self, possible: int) -> int:
        """How many of ``possible`` workers, at most as many as are wished for, share a step evenly; 0 of none."""
        counts = range(1, min(possible, self.max_workers) + 1)
        return max((count for count in counts if self.batch_size % count == 0), default=0)


class RefinementConfig(ConfigPart):
    """Scores brought along the picture's edges; see ``vilseg.segmentation.refinement``."""

    method: Literal["pamr", "guided"] = "pamr"
    """Means of like neighbours (PAMR, Araslanov & Roth 2020, section 3.3), or a guided filter (He, Sun & Tang 2013)."""
    iterations: NonNegativeInt = 0
    """0 switches it off, as ViL-Seg has none; the authors of PAMR use 10, those of the guided filter 1."""
    dilations: Annotated[list[PositiveInt], Field(min_length=1)] = [1, 2, 4, 8]
    """Distances of the neighbours in pixels of the enlarged patch grid (PAMR, six up to 24, on pixels of the picture)."""
    radius: PositiveInt = 2
    """Of the guided filter's windows, in patches."""
    upscale: PositiveInt = 4
    """Pixels a side that every patch becomes, as long as the picture has as many; more cost more and gain little."""
    tolerance: Positive = 0.1
    """Colour difference, in local standard deviations, that weakens a neighbour by a factor e (0.1 in the implementation of
    PAMR's authors); of the guided filter, contrast in standard deviations of the whole picture that is no edge. Larger values
    forgive noise and leave fewer specks."""


class SegmentationConfig(ConfigPart):
    """How a trained model cuts an image into named regions; travels with the model folder.

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
    """Longer pictures are squeezed to this ratio of sides, so that one strip cannot exhaust the memory."""
    region_weight: Fraction = 1.0
    """1 names regions only, as in the paper; 0 names every patch by itself; between blends the two scores."""
    image_mix: Fraction = 0.0
    """Share of the image's mean embedding mixed into every region's and patch's."""
    calibration: Fraction = 0.0
    """How far the cosines of each class are brought to one mean and spread over the patches of the training pictures."""
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
    """What a picture holds besides the names asked for: ``background`` takes the best of their scores. Where empty, the
    word background itself is compared. Words that are class names are left out. Used only if there is such a class."""
    background_bias: float = 0.0
    """Added to the cosine of the class ``background``."""
    objectness: NonNegative = 0.0
    """Added to it where a region runs along the picture's border, and subtracted where it keeps away from it, as objects do. Not
    of GeoTIFFs, which are never seen as a whole."""
    gate: PositiveInt | None = None
    """Only so many classes are kept in a picture, ``background`` not counted: those with the highest scores at their best place.
    Hundreds of classes then do not sprinkle a picture that shows five. Frames of films are pictures by themselves; GeoTIFFs,
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


class RunConfig(ConfigTree):
    """Everything that a run is made of."""

    name: str | None = None
    """Name of the run's folder; made from the date where absent."""
    stage: Literal["contrast", "self-train"] = "contrast"
    """``self-train`` goes on from the model of ``init`` with its own sure labels beside the other losses."""
    init: str | None = None
    """A run's folder or a model folder of vilseg that this run begins with, under the same keys of ``model``."""
    data: DataConfig = DataConfig()
    views: ViewsConfig = ViewsConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    trainer: TrainerConfig = TrainerConfig()
    segmentation: SegmentationConfig = SegmentationConfig()

    @model_validator(mode="after")
    def _stage_has_its_beginning(self) -> Self:
        if self.stage == "self-train" and not self.init:
            raise ValueError("stage self-train needs init, the folder of a trained run or model")
        if self.init and self.model.init:
            raise ValueError("give either 'init' or 'model.init', not both")
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> Self:
        if self.trainer.best_by.startswith("held_out/"):
            if not self.data.held_out:
                raise ValueError(
                    f"trainer.best_by={self.trainer.best_by} needs data.held_out, the pairs to measure it on"
                )
            if self.trainer.sharding == "fsdp":
                raise ValueError(
                    f"trainer.best_by={self.trainer.best_by} is not measured with trainer.sharding=fsdp; name a loss"
                )
        return self
