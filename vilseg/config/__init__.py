"""Run configuration: one pydantic tree of small parts, each handed alone to the component that it configures."""

from vilseg.config.run import (
    ImageEncoderConfig,
    ModelConfig,
    OptimizerConfig,
    RefinementConfig,
    RunConfig,
    SegmentationConfig,
    TextEncoderConfig,
    TrainerConfig,
    ViewsConfig,
)

__all__ = [
    "ImageEncoderConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RefinementConfig",
    "RunConfig",
    "SegmentationConfig",
    "TextEncoderConfig",
    "TrainerConfig",
    "ViewsConfig",
]
