"""The JSON of the HTTP API, as OpenAPI shows it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Rle(BaseModel):
    """COCO's compressed run-length code; ``pycocotools.mask.decode`` reads it."""

    size: Annotated[list[int], Field(description="[height, width]", min_length=2, max_length=2)]
    counts: str


class Region(BaseModel):
    """All pixels of one class."""

    model_config = ConfigDict(populate_by_name=True)

    class_name: Annotated[str, Field(alias="class")]
    class_index: int
    score: Annotated[float, Field(description="Mean over its pixels.", ge=0, le=1)]
    area: Annotated[int, Field(description="Pixels.")]
    bbox_xywh: Annotated[list[int], Field(min_length=4, max_length=4)]
    rle: Rle
    polygons: Annotated[
        list[list[list[tuple[float, float]]]] | None,
        Field(description="Of each connected part its outline and then its holes, as closed rings of (x, y)."),
    ] = None


class ImageResult(BaseModel):
    """What was found in one picture."""

    request_id: str
    model: str
    width: int
    height: int
    classes: Annotated[list[str], Field(description="All that were asked for; class_index counts in them.")]
    regions: list[Region]

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "request_id": "5f2c9a01d3b4e677",
                "model": "default",
                "width": 4,
                "height": 2,
                "classes": ["sky", "sea"],
                "regions": [
                    {
                        "class": "sky",
                        "class_index": 0,
                        "score": 0.93,
                        "area": 4,
                        "bbox_xywh": [0, 0, 4, 1],
                        "rle": {"size": [2, 4], "counts": "0111111O"},
                    }
                ],
            }
        }
    )


class ErrorBody(BaseModel):
    """What is wrong."""

    code: Annotated[str, Field(description="For programs.", examples=["not_a_picture"])]
    message: Annotated[
        str, Field(description="For people.", examples=["The bytes are not an image of a known format."])
    ]
    request_id: str


class Error(BaseModel):
    """Why there is no answer."""

    error: ErrorBody


class BatchItem(BaseModel):
    """One picture of a batch: ``result`` or ``error``."""

    name: Annotated[str, Field(description="The file name that came with it.")]
    status: Literal["ok", "rejected"]
    result: ImageResult | None = None
    error: ErrorBody | None = None


class Batch(BaseModel):
    """Pictures in the order they were sent."""

    request_id: str
    results: list[BatchItem]


class ModelInfo(BaseModel):
    """A model that can be asked for."""

    name: str
    default: bool


class Models(BaseModel):
    """All models."""

    models: list[ModelInfo]


class VideoClass(BaseModel):
    """A class in a film."""

    model_config = ConfigDict(populate_by_name=True)

    class_name: Annotated[str, Field(alias="class")]
    area: Annotated[float, Field(description="Mean pixels a frame.")]
    score: float


class VideoState(BaseModel):
    """A film and how far it is."""

    id: str
    status: Literal["queued", "running", "done", "failed"]
    status_url: str
    frames: Annotated[int, Field(description="Read so far.")] = 0
    error: str | None = None
    seconds: float | None = None
    width: int | None = None
    height: int | None = None
    classes: list[VideoClass] | None = None
    overlay_url: str | None = None
    masks_url: str | None = None


class Health(BaseModel):
    """The server answers."""

    status: Literal["ok"]
