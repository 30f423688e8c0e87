"""Complete configuration of a training run, in sections that are each passed on their own to the component they configure.

A configuration is a YAML file plus ``key.sub=value`` overrides. The docstring of a key names the source of its default; without
one, we chose the value. An unknown key is an error whose message suggests the closest valid key. The resolved configuration is
saved with every run.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from vilseg.config.base import ConfigTree
from vilseg.config.data import DataConfig
from vilseg.config.locations import ModelRef
from vilseg.config.loss import LossConfig
from vilseg.config.model import ModelConfig
from vilseg.config.segmentation import SegmentationConfig
from vilseg.config.training import OptimizerConfig, TrainerConfig
from vilseg.config.views import ViewsConfig


class RunConfig(ConfigTree):
    """Complete configuration of a training run.

    Example:
        >>> from vilseg.config import RunConfig
        >>> config = RunConfig.model_validate({"name": "first", "trainer": {"steps": 100}})
        >>> config.name, config.trainer.steps, config.trainer.seed
        ('first', 100, 0)
    """

    name: str | None = None
    """Name of the run directory; if None, a name is made from the date."""
    stage: Literal["contrast", "self-train"] = "contrast"
    """``self-train`` continues training the model at the key ``init`` below, and adds to the other losses a loss on confident
    labels that this initial model predicts."""
    init: ModelRef | None = None
    """Run directory or model folder of vilseg whose weights this run starts from; the keys of ``model`` must be the same."""
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
