"""JSON bodies of the HTTP API as pydantic models: the server encodes with them, and `vilseg.client` decodes with them.

They are also the schemas in the OpenAPI description. This module imports neither torch nor Ray.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import numpy as np
from pycocotools import mask as coco_mask
from pydantic import BaseModel, ConfigDict, Field

from vilseg.segmentation.result import Segmentation, label_dtype, no_class


class _Message(BaseModel):
    model_config = ConfigDict(populate_by_name=True)

    def to_json(self) -> bytes:
        """Encode as JSON; optional fields that were never set are left out."""
        return self.model_dump_json(by_alias=True, exclude_unset=True).encode()


class Rle(_Message):
    """Mask as COCO's compressed run-length code; ``pycocotools.mask.decode`` decodes it."""

    size: Annotated[list[int], Field(description="[height, width]", min_length=2, max_length=2)]
    counts: str


class Region(_Message):
    """Region of an image: all pixels of one class."""

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


class ImageResult(_Message):
    """Segmentation of one image.

    Example:
        >>> labels = np.array([[0, 0, 1], [0, 0, 1]], np.uint8)
        >>> result = Segmentation(labels=labels, classes=("sky", "sea"), scores=np.ones((2, 3), np.float32))
        >>> body = ImageResult.from_segmentation(result, request_id="1", model="day").to_json()
        >>> received = ImageResult.model_validate_json(body)
        >>> [(region.class_name, region.area) for region in received.regions]
        [('sky', 4), ('sea', 2)]
        >>> received.to_segmentation().labels.tolist()
        [[0, 0, 1], [0, 0, 1]]
    """

    request_id: str
    model: str
    width: int
    height: int
    classes: Annotated[list[str], Field(description="All that were asked for; class_index counts in them.")]
    regions: list[Region]

    model_config = ConfigDict(
        json_schema_extra={
            "description": "Segmentation of one image.",  # without the example in Python
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
            },
        }
    )

    @classmethod
    def from_segmentation(
        cls, result: Segmentation, *, request_id: str, model: str, with_polygons: bool = False
    ) -> Self:
        """Convert a segmentation into a response body; scores are rounded to four decimal places.

        Args:
            result: Segmentation of the image.
            request_id: Id of the request, returned in the response.
            model: Name of the model, returned in the response.
            with_polygons: Add the outlines of each region as polygons.
        """
        height, width = result.labels.shape
        index = {name: number for number, name in enumerate(result.classes)}
        regions = []
        for region in result.regions:
            outlines: dict[str, Any] = {}
            if with_polygons:
                from vilseg.segmentation.polygons import polygons  # clients need no contourpy

                outlines["polygons"] = polygons(region.rle)
            regions.append(
                Region(
                    class_name=region.class_name,
                    class_index=index[region.class_name],
                    score=round(region.score, 4),
                    area=region.area,
                    bbox_xywh=list(region.bbox_xywh),
                    rle=Rle(**region.rle),
                    **outlines,
                )
            )
        return cls(
            request_id=request_id,
            model=model,
            width=width,
            height=height,
            classes=list(result.classes),
            regions=regions,
        )

    def to_segmentation(self, image: np.ndarray | None = None) -> Segmentation:
        """Convert back to label and score maps. Every pixel of a region has the region's mean score.

        Args:
            image: RGB image that was segmented, for overlays; None if overlays are not needed. Shape: (H, W, 3), uint8.
        """
        shape = (self.height, self.width)
        dtype = label_dtype(len(self.classes))
        labels, scores = np.full(shape, no_class(dtype), dtype), np.zeros(shape, np.float32)
        for region in self.regions:
            mask = coco_mask.decode(region.rle.model_dump()).astype(bool)
            labels[mask] = region.class_index
            scores[mask] = region.score
        return Segmentation(labels=labels, scores=scores, classes=tuple(self.classes), image=image)


class ErrorBody(_Message):
    """Description of an error."""

    code: Annotated[str, Field(description="For programs.", examples=["not_a_picture"])]
    message: Annotated[
        str, Field(description="For people.", examples=["The bytes are not an image of a known format."])
    ]
    request_id: str


class Error(_Message):
    """Body of every error response (HTTP status 400 or more)."""

    error: ErrorBody


class BatchItem(_Message):
    """Outcome for one image of a batch: either ``result`` or ``error`` is set."""

    name: Annotated[str, Field(description="The file name that came with it.")]
    status: Literal["ok", "rejected"]
    result: ImageResult | None = None
    error: ErrorBody | None = None


class Batch(_Message):
    """Outcomes for the images of a batch, in the order in which the images were sent."""

    request_id: str
    results: list[BatchItem]


class ModelInfo(_Message):
    """Model that requests can name."""

    name: str
    default: bool


class Models(_Message):
    """All models, the default first."""

    models: list[ModelInfo]


class VideoClass(_Message):
    """Class that occurs in a video, with its mean area."""

    class_name: Annotated[str, Field(alias="class")]
    area: Annotated[float, Field(description="Mean pixels a frame.")]
    score: float


class VideoState(_Message):
    """Progress of a video job and, once it is done, its results."""

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


class Health(_Message):
    """Health of the server; every response means that it is up."""

    status: Literal["ok"]
