"""Engine of a replica, without Ray: decoding of images, batched segmentation, encoding of responses."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from serve.batching import Batcher
from serve.encoding import encode
from serve.request_types import EncodedImage, SegmentRequest, SegmentResponse
from vilseg import ViLSeg
from vilseg.data.image_decoding import decode_image
from vilseg.device import best_device
from vilseg.errors import DataError, TooLargeError
from vilseg.segmentation.dense_features import DenseFeatures
from vilseg.segmentation.result import Segmentation
from vilseg.segmentation.segmenter import Segmenter
from vilseg.text.vocabulary import Vocabulary


class LoadedModel:
    """Model in memory, which provides segmenters for any class list.

    Args:
        uri: URI of the model.
    """

    def __init__(self, uri: str) -> None:
        self._model = ViLSeg.from_pretrained(uri)
        self._segmenter: Segmenter | None = None

    def segmenter(self, vocabulary: Vocabulary) -> Segmenter:
        """Return the segmenter for a class list; class embeddings of recently used class lists are cached with the model."""
        if self._segmenter is None:
            self._segmenter = Segmenter(self._model, vocabulary)
        return self._segmenter.with_classes(vocabulary)


class Engine:
    """Engine that decodes, segments and encodes the images of requests; on a GPU, these steps of different images overlap.

    Args:
        batch: Maximum number of images per forward pass on a GPU; on a CPU it is 1.
        max_pixels: Maximum width x height of an image, checked by its header.
        threads: Number of CPU threads of torch's operators.
    """

    def __init__(self, *, batch: int, max_pixels: int, threads: int = 1) -> None:
        torch.set_num_threads(threads)
        # The model's thread releases the GIL in every operator and should not wait the default 5 ms to get it back.
        sys.setswitchinterval(0.0005)
        self._max_pixels = max_pixels
        gpu = best_device().type == "cuda"
        # On a CPU, batches are not faster, and decoding and encoding in other threads would slow down the model.
        self._batcher = Batcher(self._run, batch if gpu else 1)
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="codec") if gpu else self._batcher.thread

    async def segment(self, model: LoadedModel, request: SegmentRequest) -> SegmentResponse:
        """Segment the image of a request; if the image cannot be used, return an error response."""
        loop = asyncio.get_running_loop()
        begun = time.perf_counter()
        try:
            image = await loop.run_in_executor(self._pool, self._decode, request.image)
        except TooLargeError as error:
            return SegmentResponse(status=413, code="too_many_pixels", message=_sentence(error))
        except DataError as error:
            return SegmentResponse(status=422, code="not_a_picture", message=_sentence(error))
        decoded = time.perf_counter()
        result, features, started, done, batch = await self._batcher.submit(model, (request, image))
        body, media_type = await loop.run_in_executor(self._pool, encode, result, request)
        seconds = {
            "decode": decoded - begun,
            "wait": started - decoded,
            "model": done - started,
            "encode": time.perf_counter() - done,
        }
        encoded = _to_encoded(features) if request.format == "viewer" else None
        return SegmentResponse(body=body, media_type=media_type, encoded=encoded, batch=batch, seconds=seconds)

    def _decode(self, data: bytes) -> np.ndarray:
        return decode_image(data, max_pixels=self._max_pixels)

    @staticmethod
    def _run(
        model: Hashable, items: Sequence[tuple[SegmentRequest, np.ndarray]]
    ) -> Iterator[tuple[Segmentation, DenseFeatures, float, float, int]]:
        assert isinstance(model, LoadedModel)
        started = time.perf_counter()
        segmenters = [model.segmenter(request.vocabulary) for request, _ in items]
        fresh = [image for request, image in items if request.encoded is None]
        fresh_features = iter(segmenters[0].encode(fresh))
        for segmenter, (request, image) in zip(segmenters, items, strict=True):
            features = next(fresh_features) if request.encoded is None else _from_encoded(request.encoded)
            result = segmenter.classify(
                features, image, background_bias=request.background_bias, keep_clusters=request.format == "viewer"
            )
            yield result, features, started, time.perf_counter(), len(items)


def _to_encoded(features: DenseFeatures) -> EncodedImage:
    pixels, patches, assignments = (part.cpu().numpy() for part in features[:3])
    return EncodedImage(pixels_3HW=pixels, patches_ND=patches, assignments_NK=assignments, grid=features.grid)


def _from_encoded(encoded: EncodedImage) -> DenseFeatures:
    # Arrays from Ray's object store are read-only, which torch warns about.
    pixels, patches, assignments = (
        torch.from_numpy(np.array(part)) for part in (encoded.pixels_3HW, encoded.patches_ND, encoded.assignments_NK)
    )
    return DenseFeatures(pixels, patches, assignments, encoded.grid)


def _sentence(error: DataError) -> str:
    text = str(error)
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
