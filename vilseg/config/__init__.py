"""Run configuration: a pydantic model with nested sections, each of which is passed on its own to the component it configures."""

from vilseg.config.base import ConfigPart, ConfigTree, flatten
from vilseg.config.data import ColumnsConfig, DataConfig, FiltersConfig, TextConfig, WeightedSource
from vilseg.config.locations import (
    DatasetUri,
    ModelRef,
    Uri,
    absolute_locations,
    is_hub_id,
    list_locations,
    map_locations,
)
from vilseg.config.loss import (
    CrossModalConfig,
    LossConfig,
    MutualInformationConfig,
    NounsConfig,
    SelfTrainingConfig,
    VisionConfig,
)
from vilseg.config.model import ImageEncoderConfig, ModelConfig, TextEncoderConfig
from vilseg.config.run import RunConfig
from vilseg.config.segmentation import RefinementConfig, SegmentationConfig
from vilseg.config.training import OptimizerConfig, TrainerConfig
from vilseg.config.views import ViewsConfig

__all__ = [
    "ColumnsConfig",
    "ConfigPart",
    "ConfigTree",
    "CrossModalConfig",
    "DataConfig",
    "DatasetUri",
    "FiltersConfig",
    "ImageEncoderConfig",
    "LossConfig",
    "ModelConfig",
    "ModelRef",
    "MutualInformationConfig",
    "NounsConfig",
    "OptimizerConfig",
    "RefinementConfig",
    "RunConfig",
    "SegmentationConfig",
    "SelfTrainingConfig",
    "TextConfig",
    "TextEncoderConfig",
    "TrainerConfig",
    "Uri",
    "ViewsConfig",
    "VisionConfig",
    "WeightedSource",
    "absolute_locations",
    "flatten",
    "is_hub_id",
    "list_locations",
    "map_locations",
]
