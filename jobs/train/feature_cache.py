"""Write the features of frozen encoders once, so that training reads them instead of pictures and texts.

The cache is a folder of pair shards: one Parquet file for each shard of the source, in which ``image`` holds the
patch features of the picture on the canvas, float16 (N, F), with one row more for the image as a whole where the
encoder has an embedding of its own for it, and ``caption_features`` one float16 row for each caption where the text
encoder is frozen too. Where pictures have variants, there are further columns of these (``vilseg.data.cached_views``).
The cache lies in a folder named by a key, the hash of what the features depend on; another encoder, canvas or source,
or a shard written anew, has another key and leaves an earlier cache alone. ``manifest.json`` comes last: a folder
without it is only begun, and the files that are there are not written again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import torch
from torch import Tensor, nn

from cluster.ray_session import Session, find_user_error
from vilseg import storage
from vilseg.config import ModelConfig, RunConfig, ViewsConfig
from vilseg.config.data import ColumnsConfig
from vilseg.data.cached_views import VIEW_KEYS, column_name, column_of_variant, variant_seed
from vilseg.data.image_decoding import crop_to_square, decode_image
from vilseg.data.shards import CAPTION_FEATURES, MANIFEST, PARQUET, BadPair, Pair, list_shards, read_shard, write_index
from vilseg.data.views import make_views
from vilseg.device import best_device, has_bfloat16_units
from vilseg.errors import ConfigError, DataError
from vilseg.model import ImageFeatures, ViLSeg
from vilseg.model.image_encoder import build_image_encoder
from vilseg.model.text_encoder import TextEncoder, build_text_encoder
from vilseg.training.run_setup import model_settings, require_sources

_BATCH = 16
_TEXTS = 64
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("captions", pa.list_(pa.string())),
        (column_name(0), pa.binary()),
        (CAPTION_FEATURES, pa.binary()),
    ]
)
"""Of pictures without variants; their columns come after these."""


@dataclass(frozen=True)
class CacheManifest:
    """What a cache holds."""

    uri: str
    """Its folder, below ``data.feature_cache``."""
    patches: int
    """Rows of a picture: its patches, and one more where the encoder has an embedding of its own for the image as a whole."""
    features: int
    pairs: dict[str, int] = field(default_factory=dict)
    """By file name."""
    rejected: dict[str, str] = field(default_factory=dict)
    """Key and reason of pairs that could not be read."""


def main(
    config: RunConfig, session: Session, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> CacheManifest:
    """Write the cache of ``data.source`` below ``data.feature_cache``, unless it is there.

    Args:
        config: of the run; its image encoder must be frozen.
        session: the cluster.
        progress: told (shards done, shards there are).

    Raises:
        ConfigError: the image encoder is not frozen, or a key is missing.
        DataError: more than ``data.max_bad_share`` of the pairs cannot be read.
        ModelError: an encoder cannot be loaded.
    """
    assert config.data.feature_cache is not None
    if not config.model.image_encoder.frozen:
        raise ConfigError(
            "data.feature_cache needs model.image_encoder.frozen=true: features of a network that learns change"
        )
    (source,) = (part.source for part in require_sources(config).values())  # a mix is refused with the configuration
    storage.require_bucket(config.data.feature_cache)
    shards = list_shards(storage.absolute(source), without=config.data.held_out)
    encoders = make_encoders(config)
    folder = storage.join(storage.absolute(config.data.feature_cache), cache_key(config, shards, encoders))
    if storage.exists(_manifest_uri(folder)):
        return CacheManifest(**json.loads(storage.read_text(_manifest_uri(folder))))
    names = [entry.relative.replace("/", "_") + PARQUET for entry in shards]
    rows = [
        {"source": entry.uri, "target": storage.join(folder, name)} for entry, name in zip(shards, names, strict=True)
    ]
    done = _write_shards(rows, encoders, config, session, progress)
    rejected = dict(pair for shard in done for pair in json.loads(shard["rejected"]))
    pairs = {storage.name(shard["target"]): int(shard["pairs"]) for shard in done}
    total = sum(pairs.values()) + len(rejected)
    if len(rejected) > config.data.max_bad_share * total:
        key, reason = next(iter(rejected.items()))
        raise DataError(
            f"{len(rejected)} of {total} pairs could not be read, more than data.max_bad_share="
            f"{config.data.max_bad_share} allows; the first was {key}: {reason}"
        )
    write_index(folder, pairs.items())
    manifest = CacheManifest(folder, int(done[0]["patches"]), int(done[0]["features"]), pairs, rejected)
    storage.write_text(_manifest_uri(folder), json.dumps(asdict(manifest), indent=1, ensure_ascii=False))
    return manifest


class Encoders(NamedTuple):
    """What features are made with."""

    images: nn.Module
    texts: TextEncoder | None
    """Where it is frozen and its weights are not made with the run, else None."""
    settings: ModelConfig
    """Of both; with an ``init`` the keys of the model that it leads to."""


def make_encoders(config: RunConfig) -> Encoders:
    """The encoders of the model that a run of this configuration begins with, see ``vilseg.training.run_setup.prepare``.

    Raises:
        ConfigError: ``config.model`` asks for something else than the model that the run begins with.
        ModelError: it cannot be loaded.
    """
    torch.manual_seed(config.trainer.seed)
    model = model_settings(config)
    frozen_texts = model.text_encoder.frozen
    if model.init:
        start = ViLSeg.from_config(model).eval()
        return Encoders(start.image_encoder, start.text_encoder if frozen_texts else None, start.config)
    images = build_image_encoder(model.image_encoder).eval()
    loaded = frozen_texts and model.text_encoder.checkpoint
    return Encoders(images, build_text_encoder(model.text_encoder).eval() if loaded else None, model)


def _write_shards(
    rows: list[dict[str, str]],
    encoders: Encoders,
    config: RunConfig,
    session: Session,
    progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """One output file for each input file, by a pool of actors."""
    actors = max(1, min(len(rows), session.gpus or session.cpus))
    data = config.data
    settings = {
        **{"canvas": data.canvas, "max_pixels": data.max_pixels, "columns": data.columns},
        **{"variants": data.cache_variants, "views": config.views},
    }
    shared = ray.put((encoders.images, encoders.texts))
    written = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _FeatureActor,
        fn_constructor_args=([shared], settings, max(1, session.cpus // actors)),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=0.9 * session.cpus / actors,
        num_gpus=1 if session.gpus else 0,
    )
    done: list[dict[str, Any]] = []
    progress(0, len(rows))
    try:
        for row in written.iter_rows():
            done.append(row)
            progress(len(done), len(rows))
    except ray.exceptions.RayError as error:
        raise find_user_error(error) or error from None
    return done


class FeatureWriter:
    """Turns pair shards into shards of features.

    Args:
        image_encoder: frozen; moved to a GPU where there is one.
        text_encoder: where it is frozen too, else None.
        canvas: side of the square that pictures are brought to, the middle of the longer side.
        max_pixels: pictures with more are rejected.
        columns: names of the columns of Parquet shards.
        variants: feature sets of a picture; the first is of its middle, the others of random views.
        views: crops, flips and colours of these.
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
        # All variants are as large: the number of patches is one.
        self._variants, self._views = variants, (views or ViewsConfig()).model_copy(update={"global_size": canvas})

    def write(self, source: str, target: str) -> dict[str, Any]:
        """Write the features of the shard ``source`` to ``target``, or look at what is there; counts and sizes."""
        if storage.exists(target):
            with storage.open_input(target) as file:
                return json.loads(pq.read_schema(file).metadata[b"vilseg"])
        good: list[Pair] = []
        by_column: list[list[bytes]] = [[] for _ in range(self._variants)]
        rejected: list[tuple[str, str]] = []
        for pairs, pictures in self._decoded(source, rejected):
            good += pairs
            for column, found in zip(by_column, self._image_features(pairs, pictures), strict=True):
                column += found
        rows = {
            "key": [pair.key for pair in good],
            "captions": [list(pair.captions) for pair in good],
            CAPTION_FEATURES: self._caption_features([pair.captions for pair in good]),
            **{column_name(number): column for number, column in enumerate(by_column)},
        }
        blank = torch.zeros((1, 3, self._canvas, self._canvas), device=self._device)
        patches, features = self._encode(blank).shape[1:]
        summary = {
            "target": target,
            "pairs": len(good),
            "patches": patches,
            "features": features,
            "rejected": json.dumps(rejected),
        }
        schema = _SCHEMA
        for number in range(1, self._variants):
            schema = schema.append(pa.field(column_name(number), pa.binary()))
        table = pa.Table.from_pydict(rows, schema=schema.with_metadata({"vilseg": json.dumps(summary)}))
        with storage.open_atomic(target) as file:
            # Half floats of a network do not shrink; rows of a group are read together, so groups are kept small.
            pq.write_table(table, file, row_group_size=64, compression="none", use_dictionary=False)
        return summary

    def _decoded(self, source: str, rejected: list[tuple[str, str]]) -> Iterator[tuple[list[Pair], list[np.ndarray]]]:
        """The readable pairs of a shard with their pictures, some at a time; key and reason of others go to ``rejected``."""
        pairs: list[Pair] = []
        pictures: list[np.ndarray] = []
        for pair in read_shard(source, self._columns):
            if isinstance(pair, BadPair):
                rejected.append((pair.key, pair.reason))
                continue
            try:
                picture = decode_image(pair.image, max_pixels=self._max_pixels, min_side=self._canvas)
            except DataError as error:
                rejected.append((pair.key, str(error)))
                continue
            pairs.append(pair)
            pictures.append(picture)
            if len(pairs) == _BATCH:
                yield pairs, pictures
                pairs, pictures = [], []
        if pairs:
            yield pairs, pictures

    def _image_features(self, pairs: Sequence[Pair], pictures: Sequence[np.ndarray]) -> list[list[bytes]]:
        """The rows of each picture, float16, for each column."""
        columns = [[b""] * len(pairs) for _ in range(self._variants)]
        for variant in range(self._variants):
            rows_BRF = self._encode(self._pixels(pairs, pictures, variant))
            for place, (pair, rows_RF) in enumerate(zip(pairs, rows_BRF, strict=True)):
                columns[column_of_variant(variant, pair.key, self._variants)][place] = rows_RF.tobytes()
        return columns

    def _pixels(self, pairs: Sequence[Pair], pictures: Sequence[np.ndarray], variant: int) -> Tensor:
        """What a variant shows of each picture. Shape: -> (B, 3, canvas, canvas), float32 in 0..1."""
        seeds = [variant_seed(pair.key, variant) for pair in pairs]
        # As training without a cache places the canvas and the view on it.
        positions = [(seed & 0xFFFF) / 0xFFFF if variant else 0.5 for seed in seeds]
        squares = [crop_to_square(image, self._canvas, at) for image, at in zip(pictures, positions, strict=True)]
        images_BHW3 = torch.from_numpy(np.stack(squares)).to(self._device)
        if not variant:
            return images_BHW3.permute(0, 3, 1, 2).float().div_(255)
        seeds_B = torch.tensor(seeds, device=self._device)
        return make_views(images_BHW3, seeds_B, self._views, global_crops=1, local_crops=0).global_GB3HW[0]

    @torch.inference_mode()
    def _encode(self, pixels_B3HW: Tensor) -> np.ndarray:
        """Patches and, where the encoder has an embedding of its own for it, the whole. Shape: -> (B, R, F), float16."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=has_bfloat16_units(self._device)):
            found: ImageFeatures = self._images(pixels_B3HW)
        h, w = found.grid
        if h != w:  # whoever reads the cache knows the grid by the number of patches
            raise ConfigError(
                f"data.feature_cache needs an encoder with as many patches down as across a square canvas; this one has {h} x {w}"
            )
        rows_BRF = found.patches.half()
        if found.pooled is not None:
            rows_BRF = torch.cat([rows_BRF, found.pooled.half().unsqueeze(1)], 1)
        return rows_BRF.cpu().numpy()

    @torch.inference_mode()
    def _caption_features(self, captions: Sequence[Sequence[str]]) -> list[bytes | None]:
        """float16 rows of each picture's captions; None without a frozen text encoder."""
        if self._texts is None:
            return [None] * len(captions)
        texts = [text for those in captions for text in those]
        # Captions of one length share a batch: padding would be half of the work.
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        rows = np.empty((len(texts), self._texts.num_features), np.float16)
        for start in range(0, len(order), _TEXTS):
            some = order[start : start + _TEXTS]
            tokens = self._texts.trim(self._texts.tokenize([texts[index] for index in some])).to(self._device)
            rows[some] = self._texts(tokens).half().cpu().numpy()
        ends = np.cumsum([len(those) for those in captions])
        return [part.tobytes() for part in np.split(rows, ends[:-1])] if len(captions) else []


class _FeatureActor:
    """What Ray Data makes one of in every actor."""

    def __init__(self, encoders: list[Any], settings: dict[str, Any], threads: int) -> None:
        torch.set_num_threads(threads)
        image_encoder, text_encoder = ray.get(encoders[0])
        self._writer = FeatureWriter(image_encoder, text_encoder, **settings)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        summary = self._writer.write(str(batch["source"][0]), str(batch["target"][0]))
        return {name: np.array([value]) for name, value in summary.items()}


def cache_key(config: RunConfig, shards: Sequence[storage.FileEntry], encoders: Encoders) -> str:
    """Hash of everything that the features and captions depend on: the name of their folder.

    Of a shard, its name, size and time of writing stand for its content: it may be large, and tars are padded, so that another
    one may have the same size.
    """
    data, model = config.data, encoders.settings
    # What the weights of the encoders alone do not tell; where they were loaded from is no matter.
    text = model.text_encoder.model_dump(mode="json", include={"architecture", "sizes", "pooling", "max_tokens"})
    depends_on = [
        storage.absolute(str(data.source)),
        [(entry.relative, entry.size, entry.modified_ns) for entry in shards],
        data.columns.model_dump(),
        data.canvas,
        data.max_pixels,  # pairs with more are left out
        data.cache_variants,
        config.views.model_dump(include=set(VIEW_KEYS)) if data.cache_variants > 1 else None,
        model.image_encoder.model_dump(mode="json", exclude={"checkpoint", "frozen"}),
        None if encoders.texts is None else text,
    ]
    digest = hashlib.sha256(json.dumps(depends_on).encode())
    for module in (encoders.images, encoders.texts):
        for name, tensor in module.state_dict().items() if module is not None else ():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _manifest_uri(folder: str) -> str:
    return storage.join(folder, MANIFEST)
