"""From bytes to answers with the models of one process; what a replica does, without Ray."""

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
    """A model, to be asked for any classes."""

    def __init__(self, uri: str) -> None:
        self._model = ViLSeg.from_pretrained(uri)
        self._segmenter: Segmenter | None = None

    def segmenter(self, vocabulary: Vocabulary) -> Segmenter:
        """The segmenter of a class list; the texts of those asked for lately are kept with the model."""
        if self._segmenter is None:
            self._segmenter = Segmenter(self._model, vocabulary)
        return self._segmenter.with_classes(vocabulary)


class Engine:
    """Answers questions about pictures. With a GPU, decoding, model and encoding of different pictures overlap.

    Args:
        batch: most pictures a pass through the model on a GPU.
        max_pixels: what a picture's header may announce.
        threads: of the model's own computations.
    """

    def __init__(self, *, batch: int, max_pixels: int, threads: int = 1) -> None:
        torch.set_num_threads(threads)
        # The model's thread lets go of Python's lock in every operator; it should not wait 5 ms to have it back.
        sys.setswitchinterval(0.0005)
        self._max_pixels = max_pixels
        gpu = best_device().type == "cuda"
        # On a CPU a batch is no faster, and decoding and encoding beside the model only get into its way.
        self._batcher = Batcher(self._run, batch if gpu else 1)
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="pictures") if gpu else self._batcher.thread

    async def answer(self, model: LoadedModel, question: SegmentRequest) -> SegmentResponse:
        """The answer to one question; a picture that cannot be used is an answer as well."""
        loop = asyncio.get_running_loop()
        begun = time.perf_counter()
        try:
            image = await loop.run_in_executor(self._pool, self._decode, question.image)
        except TooLargeError as error:
            return SegmentResponse(status=413, code="too_many_pixels", message=_sentence(error))
        except DataError as error:
            return SegmentResponse(status=422, code="not_a_picture", message=_sentence(error))
        decoded = time.perf_counter()
        result, look, started, done, batch = await self._batcher.submit(model, (question, image))
        body, media_type = await loop.run_in_executor(self._pool, encode, result, question)
        seconds = {
            "decode": decoded - begun,
            "wait": started - decoded,
            "model": done - started,
            "encode": time.perf_counter() - done,
        }
        seen = _keep(look) if question.format == "view" else None
        return SegmentResponse(body=body, media_type=media_type, seen=seen, batch=batch, seconds=seconds)

    def _decode(self, data: bytes) -> np.ndarray:
        return decode_image(data, max_pixels=self._max_pixels)

    @staticmethod
    def _run(
        model: Hashable, items: Sequence[tuple[SegmentRequest, np.ndarray]]
    ) -> Iterator[tuple[Segmentation, DenseFeatures, float, float, int]]:
        assert isinstance(model, LoadedModel)
        started = time.perf_counter()
        segmenters = [model.segmenter(question.vocabulary) for question, _ in items]
        fresh = [image for question, image in items if question.seen is None]
        looked = iter(segmenters[0].encode(fresh))
        for segmenter, (question, image) in zip(segmenters, items, strict=True):
            look = next(looked) if question.seen is None else _recall(question.seen)
            result = segmenter.classify(
                look, image, background_bias=question.background_bias, keep_clusters=question.format == "view"
            )
            yield result, look, started, time.perf_counter(), len(items)


def _keep(look: DenseFeatures) -> EncodedImage:
    pixels, patches, assignments = (part.cpu().numpy() for part in look[:3])
    return EncodedImage(pixels_3HW=pixels, patches_ND=patches, assignments_NK=assignments, grid=look.grid)


def _recall(seen: EncodedImage) -> DenseFeatures:
    # Arrays from Ray's object store are read-only, and torch warns of those.
    pixels, patches, assignments = (
        torch.from_numpy(np.array(part)) for part in (seen.pixels_3HW, seen.patches_ND, seen.assignments_NK)
    )
    return DenseFeatures(pixels, patches, assignments, seen.grid)


def _sentence(error: DataError) -> str:
    text = str(error)
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
