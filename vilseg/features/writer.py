"""Encode one pair shard with frozen encoders and write its features as a Parquet file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from vilseg import storage
from vilseg.config import ViewsConfig
from vilseg.config.data import ColumnsConfig
from vilseg.data.cached_views import column_name, column_of_variant, variant_seed
from vilseg.data.image_decoding import crop_to_square, decode_image
from vilseg.data.shards import CAPTION_FEATURES, BadPair, Pair, read_shard
from vilseg.data.views import make_views
from vilseg.device import best_device, has_bfloat16_units
from vilseg.errors import ConfigError, DataError
from vilseg.features.manifest import ShardSummary
from vilseg.model import ImageFeatures
from vilseg.model.text_encoder import TextEncoder

_IMAGE_BATCH = 16
_TEXT_BATCH = 64
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("captions", pa.list_(pa.string())),
        (column_name(0), pa.binary()),
        (CAPTION_FEATURES, pa.binary()),
    ]
)
"""Columns of a cached shard without variants; the columns of further variants come after these."""


class FeatureWriter:
    """Writer that encodes the images and captions of one shard at a time and stores the features as a Parquet file.

    Args:
        image_encoder: frozen image encoder; moved to the GPU if there is one.
        text_encoder: frozen text encoder; None if caption features are not cached.
        canvas: side, in pixels, of the square that every image is resized and cropped to.
        max_pixels: maximum width x height of an image; larger images are rejected.
        columns: names of the columns in the source's Parquet shards.
        variants: number of feature sets for each image: one of the central square, the others of random views.
        views: settings of the random views (crops, flips and colours); None takes the defaults.

    Example:
        >>> import io, tempfile
        >>> from PIL import Image
        >>> from vilseg.data.shards import write_tar
        >>> from vilseg.model.image_encoder import LocalConvEncoder
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (32, 32), "green").save(file, "PNG")
        >>> encoder = LocalConvEncoder(width=16, depth=1, patch_size=8)
        >>> writer = FeatureWriter(encoder, None, canvas=32, max_pixels=10_000, columns=ColumnsConfig())
        >>> with tempfile.TemporaryDirectory() as root:
        ...     _ = write_tar(f"{root}/0.tar", [("k", file.getvalue(), "png", {"caption": "grass"})])
        ...     summary = writer.write(f"{root}/0.tar", f"{root}/0.tar.parquet")
        >>> summary["pairs"], summary["patches"], summary["features"]  # 32 / 8 = 4 patches a side
        (1, 16, 16)
    """

    def __init__(
        self,
        image_encoder: nn.Module,
        text_encoder: TextEncoder | None,
        *,
        canvas: int,
        max_pixels: int,
        columns: ColumnsConfig,
        variants: int = 1,
        views: ViewsConfig | None = None,
    ) -> None:
        self._device = best_device()
        self._images = image_encoder.to(self._device).eval().requires_grad_(False)
        self._texts = None if text_encoder is None else text_encoder.to(self._device).eval()
        self._canvas, self._max_pixels, self._columns = canvas, max_pixels, columns
        # All variants have the same size in pixels, and therefore the same number of patches.
        self._variants, self._views = variants, (views or ViewsConfig()).replace(global_size=canvas)

    def write(self, source: str, target: str) -> ShardSummary:
        """Write the features of the shard at URI ``source`` to URI ``target``, and return the summary of ``target``.

        If ``target`` exists, nothing is written and the summary is read from it.
        """
        if storage.exists(target):
            with storage.open_input(target) as file:
                return json.loads(pq.read_schema(file).metadata[b"vilseg"])
        encoded: list[Pair] = []
        columns: list[list[bytes]] = [[] for _ in range(self._variants)]
        rejected: list[tuple[str, str]] = []
        for pairs, images in self._decoded_batches(source, rejected):
            encoded += pairs
            for column, features in zip(columns, self._image_features(pairs, images), strict=True):
                column += features
        rows = {
            "key": [pair.key for pair in encoded],
            "captions": [list(pair.captions) for pair in encoded],
            CAPTION_FEATURES: self._caption_features([pair.captions for pair in encoded]),
            **{column_name(number): column for number, column in enumerate(columns)},
        }
        blank = torch.zeros((1, 3, self._canvas, self._canvas), device=self._device)
        patches, features = self._encode(blank).shape[1:]
        summary: ShardSummary = {
            "target": target,
            "pairs": len(encoded),
            "patches": patches,
            "features": features,
            "rejected": json.dumps(rejected),
        }
        schema = _SCHEMA
        for number in range(1, self._variants):
            schema = schema.append(pa.field(column_name(number), pa.binary()))
        table = pa.Table.from_pydict(rows, schema=schema.with_metadata({"vilseg": json.dumps(summary)}))
        with storage.open_atomic(target) as file:
            # float16 features do not compress. The rows of a group are read together, so groups are kept small.
            pq.write_table(table, file, row_group_size=64, compression="none", use_dictionary=False)
        return summary

    def _decoded_batches(
        self, source: str, rejected: list[tuple[str, str]]
    ) -> Iterator[tuple[list[Pair], list[np.ndarray]]]:
        """Yield batches of the readable pairs of a shard with their images.

        For each unreadable pair (key, reason) is appended to ``rejected``.
        """
        pairs: list[Pair] = []
        images: list[np.ndarray] = []
        for pair in read_shard(source, self._columns):
            if isinstance(pair, BadPair):
                rejected.append((pair.key, pair.reason))
                continue
            try:
                image = decode_image(pair.image, max_pixels=self._max_pixels, min_side=self._canvas)
            except DataError as error:
                rejected.append((pair.key, str(error)))
                continue
            pairs.append(pair)
            images.append(image)
            if len(pairs) == _IMAGE_BATCH:
                yield pairs, images
                pairs, images = [], []
        if pairs:
            yield pairs, images

    def _image_features(self, pairs: Sequence[Pair], images: Sequence[np.ndarray]) -> list[list[bytes]]:
        """Return, for each column of image features, a list with the float16 features of each image as bytes."""
        columns = [[b""] * len(pairs) for _ in range(self._variants)]
        for variant in range(self._variants):
            rows_BRF = self._encode(self._pixels(pairs, images, variant))
            for index, (pair, rows_RF) in enumerate(zip(pairs, rows_BRF, strict=True)):
                columns[column_of_variant(variant, pair.key, self._variants)][index] = rows_RF.tobytes()
        return columns

    def _pixels(self, pairs: Sequence[Pair], images: Sequence[np.ndarray], variant: int) -> Tensor:
        """Return one variant of each image: the central square (variant 0), or a random view within a random square.

        Shape: -> (B, 3, canvas, canvas), float32 in 0..1.
        """
        seeds = [variant_seed(pair.key, variant) for pair in pairs]
        # Training without a cache chooses the square, and the random view within it, in the same manner.
        positions = [(seed & 0xFFFF) / 0xFFFF if variant else 0.5 for seed in seeds]
        squares = [crop_to_square(image, self._canvas, at) for image, at in zip(images, positions, strict=True)]
        images_BHW3 = torch.from_numpy(np.stack(squares)).to(self._device)
        if not variant:
            return images_BHW3.permute(0, 3, 1, 2).float().div_(255)
        seeds_B = torch.tensor(seeds, device=self._device)
        return make_views(images_BHW3, seeds_B, self._views, global_crops=1, local_crops=0).global_GB3HW[0]

    @torch.inference_mode()
    def _encode(self, pixels_B3HW: Tensor) -> np.ndarray:
        """Return the patch features, followed by the global feature if the encoder has one. Shape: -> (B, R, F), float16."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=has_bfloat16_units(self._device)):
            encoded: ImageFeatures = self._images(pixels_B3HW)
        h, w = encoded.grid
        if h != w:  # readers of the cache derive the grid from the number of patches
            raise ConfigError(
                f"data.feature_cache needs an encoder with as many patches down as across a square canvas; this one has {h} x {w}"
            )
        rows_BRF = encoded.patches.half()
        if encoded.pooled is not None:
            rows_BRF = torch.cat([rows_BRF, encoded.pooled.half().unsqueeze(1)], 1)
        return rows_BRF.cpu().numpy()

    @torch.inference_mode()
    def _caption_features(self, captions: Sequence[Sequence[str]]) -> list[bytes | None]:
        """Return the float16 features of each image's captions as bytes; None for each image if there is no text encoder."""
        if self._texts is None:
            return [None] * len(captions)
        texts = [text for group in captions for text in group]
        # Captions of similar length share a batch; otherwise padding would be half of the work.
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        rows = np.empty((len(texts), self._texts.num_features), np.float16)
        for start in range(0, len(order), _TEXT_BATCH):
            batch = order[start : start + _TEXT_BATCH]
            tokens = self._texts.trim(self._texts.tokenize([texts[index] for index in batch])).to(self._device)
            rows[batch] = self._texts(tokens).half().cpu().numpy()
        ends = np.cumsum([len(group) for group in captions])
        return [part.tobytes() for part in np.split(rows, ends[:-1])] if len(captions) else []
