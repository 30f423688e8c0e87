"""Routes that segment images: ``/v1/segment`` and ``/v1/segment/batch``."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, File, Form, Response, UploadFile

from serve.config import MAX_BATCH_IMAGES
from serve.http.forms import Background, Bias, Classes, FormParser, ModelName, RequestId, Threshold
from serve.http_errors import HttpError
from serve.metrics import Metrics
from serve.request_types import SegmentFunction, SegmentRequest
from vilseg.api_schema import Batch, BatchItem, ImageResult


def add_image_routes(api: APIRouter, segment_image: SegmentFunction, parser: FormParser, metrics: Metrics) -> None:
    """Add the routes to ``api``.

    Args:
        api: Router to add to.
        segment_image: Function that sends a request to a replica.
        parser: Parser of form fields.
        metrics: Metrics to update.
    """
    _add_segment(api, segment_image, parser)
    _add_batch(api, segment_image, parser, metrics)


def _add_segment(api: APIRouter, segment_image: SegmentFunction, parser: FormParser) -> None:
    @api.post(
        "/v1/segment",
        summary="Segment one image",
        response_class=Response,
        responses={
            200: {
                "description": "JSON with run-length codes; or the label map, or the overlay, as PNG.",
                "content": {
                    "application/json": {"schema": {"$ref": "#/components/schemas/ImageResult"}},
                    "image/png": {"schema": {"type": "string", "format": "binary"}},
                },
            }
        },
    )
    async def segment(
        request_id: RequestId,
        image: Annotated[UploadFile, File(description="An image of any usual format.")],
        classes: Classes,
        background: Background = "false",
        threshold: Threshold = 0.0,
        background_bias: Bias = None,
        format: Annotated[Literal["json", "png", "overlay"], Form()] = "json",
        polygons: Annotated[bool, Form(description="Outlines beside the run-length codes.")] = False,
        model: ModelName = None,
    ) -> Response:
        request = SegmentRequest(
            request_id=request_id,
            model=parser.model(model),
            image=await image.read(),
            vocabulary=parser.vocabulary(classes, background),
            background_bias=background_bias,
            threshold=threshold,
            format=format,
            polygons=polygons,
        )
        response = await segment_image(request)
        return Response(response.body, media_type=response.media_type)


def _add_batch(api: APIRouter, segment_image: SegmentFunction, parser: FormParser, metrics: Metrics) -> None:
    async def segment_item(name: str, request: SegmentRequest) -> BatchItem:
        try:
            response = await segment_image(request)
        except HttpError as error:
            if error.status == 503:
                raise  # not caused by the images, so the client should repeat the whole request
            metrics.rejected.labels(error.code).inc()
            return BatchItem(name=name, status="rejected", error=error.to_schema(request.request_id))
        result = await asyncio.to_thread(ImageResult.model_validate_json, response.body)
        return BatchItem(name=name, status="ok", result=result)

    @api.post(
        "/v1/segment/batch",
        summary="Segment up to 16 images",
        response_model=Batch,
    )
    async def segment_batch(
        request_id: RequestId,
        images: Annotated[list[UploadFile], File(min_length=1, max_length=MAX_BATCH_IMAGES)],
        classes: Classes,
        background: Background = "false",
        threshold: Threshold = 0.0,
        background_bias: Bias = None,
        polygons: Annotated[bool, Form()] = False,
        model: ModelName = None,
    ) -> Response:
        model_name, vocabulary = parser.model(model), parser.vocabulary(classes, background)

        async def item(number: int, image: UploadFile) -> BatchItem:
            request = SegmentRequest(
                request_id=f"{request_id}-{number}",
                model=model_name,
                image=await image.read(),
                vocabulary=vocabulary,
                background_bias=background_bias,
                threshold=threshold,
                polygons=polygons,
            )
            return await segment_item(image.filename or "", request)

        tasks = [asyncio.ensure_future(item(number, image)) for number, image in enumerate(images)]
        try:
            results = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        body = await asyncio.to_thread(Batch(request_id=request_id, results=results).to_json)
        return Response(body, media_type="application/json")
