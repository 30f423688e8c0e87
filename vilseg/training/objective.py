"""The training objective: a batch of pairs in, the four losses out. This is what data-parallel training wraps."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vilseg.config import LossConfig, ViewsConfig
from vilseg.data.stream import WorkerBatch
from vilseg.data.views import align, make_views, uniform
from vilseg.distributed import gather_rows, mean_over_workers
from vilseg.losses import VisionContrast, contrast, mutual_information_loss, noun_contrast, patch_contrast
from vilseg.model import ImageEmbeddings, ImageFeatures, ViLSeg
from vilseg.training.sharding import part_of

_DROPOUT_DRAW = 1_000
"""Random numbers for feature dropout are drawn far from those of the views."""
_MEMORY = 100
"""Steps that the running statistics look back on."""
_RECORDED_PATCHES = 1024
"""Patches a worker and step whose embeddings enter the statistics: enough for them, cheap beside the step itself."""


@dataclass(frozen=True)
class TensorBatch:
    """A worker's pairs on its device; see :class:`WorkerBatch` for the shapes."""

    images: Tensor
    tokens: Tensor
    phrases: Tensor
    seeds: Tensor
    keys: tuple[str, ...]

    @classmethod
    def of(cls, batch: WorkerBatch, device: torch.device) -> TensorBatch:
        """Copy a batch to the device; to a GPU from pinned memory, so that the copy does not hold up the caller."""
        images, tokens, phrases, seeds = (
            _owned(array, pinned=device.type == "cuda").to(device, non_blocking=True)
            for array in (batch.images, batch.tokens, batch.phrases, batch.seeds)
        )
        return cls(images, tokens if tokens.is_floating_point() else tokens.long(), phrases.long(), seeds, batch.keys)


def _owned(array: np.ndarray, *, pinned: bool) -> Tensor:
    """A tensor with a copy of the array, which may be a read-only view of shared memory; torch wants to own what it wraps."""
    if not pinned:
        return torch.tensor(array)
    dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
    tensor = torch.empty(array.shape, dtype=dtype, pin_memory=True)
    tensor.numpy()[...] = array
    return tensor


class Objective(nn.Module):
    """The losses of ViL-Seg (section 3) and the multi-label noun contrast on one batch.

    Args:
        model: the student; trained in place.
        loss: weights and temperatures; a loss of weight 0 costs nothing.
        views: augmentation.
        phrases: noun phrases of the corpus that batches refer to by index.
        autocast: dtype that the networks run in; float32 for none.
    """

    teacher: nn.ModuleDict | None
    _phrase_tokens_PT: Tensor

    def __init__(
        self,
        model: ViLSeg,
        loss: LossConfig,
        views: ViewsConfig,
        phrases: tuple[str, ...] = (),
        *,
        autocast: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = loss
        self.views = views
        self.autocast = autocast
        tokens = model.text_encoder.tokenize(phrases)
        self.register_buffer("_phrase_tokens_PT", tokens, persistent=False)
        self._frozen_phrases_PF: Tensor | None = None
        self.teacher = None
        if loss.vision.weight:
            self.vision_head = ProjectionHead(
                model.image_projection.in_features, loss.vision.hidden_dim, loss.vision.prototypes
            )
            self.vision_loss = VisionContrast(
                loss.vision.prototypes,
                student_temperature=loss.vision.student_temperature,
                teacher_temperature=loss.vision.teacher_temperature,
                center_momentum=loss.vision.center_momentum,
            )
            encoder_copy = nn.Identity() if model.config.image_encoder.frozen else copy.deepcopy(model.image_encoder)
            self.teacher = nn.ModuleDict({"encoder": encoder_copy, "head": copy.deepcopy(self.vision_head)})
            self.teacher.requires_grad_(False)
        if not loss.mutual_information.weight:
            model.clustering_head.requires_grad_(False)

    def forward(self, batch: TensorBatch) -> dict[str, Tensor]:
        """Losses of this worker's share by name, each unweighted, and their weighted sum as ``loss``.

        The mean of ``loss`` over the workers is that of the whole batch, and so is its gradient.
        """
        with self._autocast(batch):
            global_features, local_features, geometry = self._see(batch)
            caption_features = self._caption_features(batch)
        embeddings = self._embed(global_features[0])
        texts_BD = self.model.embed_text(caption_features.float())
        losses: dict[str, Tensor] = {}
        if self.config.cross_modal.weight:
            losses["cross_modal"] = self._cross_modal(embeddings, texts_BD)
        if self.config.nouns.weight:
            losses["nouns"] = self._nouns(batch, embeddings)
        if self.config.mutual_information.weight:
            losses["mutual_information"] = self._mutual_information(global_features, geometry)
        if self.config.vision.weight:
            losses["vision"] = self._vision(batch, global_features, local_features)
        if self.training:
            self._record(texts_BD)
        total = torch.stack([getattr(self.config, name).weight * value for name, value in losses.items()]).sum()
        return {"loss": total, **{f"loss/{name}": value.detach() for name, value in losses.items()}}

    @torch.no_grad()
    def update_teacher(self, progress: float) -> None:
        """Move the teacher towards the student; ``progress`` in 0..1 raises the momentum to 1 by a cosine (DINO, 3.2)."""
        if self.teacher is None:
            return
        start = self.config.vision.teacher_momentum
        momentum = 1 - (1 - start) * (math.cos(math.pi * progress) + 1) / 2
        pairs: list[tuple[nn.Module, nn.Module]] = [(self.teacher["head"], self.vision_head)]
        if not self.model.config.image_encoder.frozen:
            pairs.append((self.teacher["encoder"], self.model.image_encoder))
        for teacher, student in pairs:
            for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
                part_of(old).lerp_(part_of(new), 1 - momentum)
            for kept, current in zip(teacher.buffers(), student.buffers(), strict=True):
                kept.copy_(current)

    def _autocast(self, batch: TensorBatch) -> torch.autocast:
        enabled = self.autocast != torch.float32
        return torch.autocast(batch.images.device.type, self.autocast if enabled else None, enabled=enabled)

    def _see(self, batch: TensorBatch) -> tuple[list[ImageFeatures], list[ImageFeatures], Tensor | None]:
        """Float32 features of the global and of the local views, and the geometry of the global ones."""
        count = 2 if self.config.mutual_information.weight or self.config.vision.weight else 1
        if batch.images.dtype != torch.uint8:  # cached patch features: views differ by dropout alone
            features = _cached_features(batch.images)
            self._undropped_BNF = features.patches
            return [self._drop(features, batch.seeds, number) for number in range(count)], [], None
        local_count = self.views.local_crops if self.config.vision.weight else 0
        views = make_views(batch.images, batch.seeds, self.views, global_crops=count, local_crops=local_count)
        # The teacher looks at the same pixels; making them twice would cost as much as a small encoder.
        self._global_views = views.global_GB3HW
        # Where the second view serves the clustering head alone, nothing flows back through its encoding.
        learns = self.config.vision.weight > 0 or self.config.mutual_information.train_encoder
        seen = []
        for number, view in enumerate(views.global_GB3HW):
            with torch.set_grad_enabled(torch.is_grad_enabled() and (number == 0 or learns)):
                seen.append(_float32(self.model.image_features(view)))
        local = [_float32(self.model.image_features(view)) for view in views.local_LB3HW]
        self._undropped_BNF = seen[0].patches
        return [self._drop(f, batch.seeds, number) for number, f in enumerate(seen)], local, views.geometry_GB23

    def _drop(self, features: ImageFeatures, seeds_B: Tensor, number: int) -> ImageFeatures:
        """Feature dropout: the same channels of an image's every patch, chosen by the pair's seed."""
        share = self.views.feature_dropout
        if not share or not self.training:
            return features
        random_BF = uniform(seeds_B, _DROPOUT_DRAW + number, features.patches.shape[2])
        keep_BF = (random_BF >= share).to(features.patches.dtype) / (1 - share)
        pooled = None if features.pooled is None else features.pooled * keep_BF
        return features._replace(patches=features.patches * keep_BF.unsqueeze(1), pooled=pooled)

    def _caption_features(self, batch: TensorBatch) -> Tensor:
        if batch.tokens.is_floating_point():  # cached
            return batch.tokens
        return self.model.text_features(self.model.text_encoder.trim(batch.tokens))

    def _embed(self, features: ImageFeatures) -> ImageEmbeddings:
        """Embeddings of the images, and of their patches if a loss looks at them: these are most of the work."""
        if self.config.nouns.weight or self.config.cross_modal.patch_share:
            return self.model.embed(features)
        pooled_BD = self.model.embed_pooled(features)
        return ImageEmbeddings(pooled_BD, pooled_BD.new_empty((len(pooled_BD), 0, pooled_BD.shape[1])), features.grid)

    def _cross_modal(self, embeddings: ImageEmbeddings, texts_BD: Tensor) -> Tensor:
        config, scale = self.config.cross_modal, self.model.scale
        loss = contrast(embeddings.pooled, texts_BD, scale) * (1 - config.patch_share)
        if config.patch_share == 0:
            return loss
        if config.patch_pooling == "mean":
            pooled_BD = F.normalize(embeddings.patches.mean(1), dim=-1)
            return loss + config.patch_share * contrast(pooled_BD, texts_BD, scale)
        by_patches = patch_contrast(embeddings.patches, texts_BD, scale, config.pooling_temperature)
        return loss + config.patch_share * by_patches

    def _nouns(self, batch: TensorBatch, embeddings: ImageEmbeddings) -> Tensor:
        present = gather_rows(batch.phrases).unique()
        present_P = present[present >= 0]
        if len(present_P):
            with self._autocast(batch):
                features = self._phrase_features(present_P)
            phrases_PD = self.model.embed_text(features.float())
        else:
            phrases_PD = embeddings.patches.new_empty((0, embeddings.patches.shape[2]))
        positives_BP = (batch.phrases.unsqueeze(2) == present_P).any(1)
        return noun_contrast(
            embeddings.patches, phrases_PD, positives_BP, self.model.scale, self.config.nouns.top_patches
        )

    def _phrase_features(self, present_P: Tensor) -> Tensor:
        """Text features of some phrases; a frozen text encoder is asked once for each."""
        if not self.model.config.text_encoder.frozen:
            return self.model.text_features(self.model.text_encoder.trim(self._phrase_tokens_PT[present_P]))
        if self._frozen_phrases_PF is None:
            chunks = self._phrase_tokens_PT.split(256)
            self._frozen_phrases_PF = torch.cat([self.model.text_features(tokens).float() for tokens in chunks])
        return self._frozen_phrases_PF[present_P]

    def _mutual_information(self, features: list[ImageFeatures], geometry_GB23: Tensor | None) -> Tensor:
        config = self.config.mutual_information
        maps = []
        for view in features[:2]:
            seen = view if config.train_encoder else view._replace(patches=view.patches.detach())
            maps.append(self.model.cluster_logits(seen).softmax(-1).transpose(1, 2).unflatten(2, view.grid))
        valid = None
        if geometry_GB23 is not None:
            maps[1], valid = align(maps[1], geometry_GB23[1], geometry_GB23[0], features[0].grid)
        return mutual_information_loss(
            maps[0], maps[1], valid, radius=config.radius, entropy_weight=config.entropy_weight
        )

    def _vision(self, batch: TensorBatch, global_: list[ImageFeatures], local: list[ImageFeatures]) -> Tensor:
        assert self.teacher is not None
        student_VBK = torch.stack([self.vision_head(_pooled(features)) for features in [*global_, *local]])
        with torch.no_grad():
            if self.model.config.image_encoder.frozen:
                seen = [_cached_features(batch.images)] * 2 if batch.images.dtype != torch.uint8 else global_
            else:
                with self._autocast(batch):
                    seen = [_float32(self.teacher["encoder"](view)) for view in self._global_views]
            teacher_GBK = torch.stack([self.teacher["head"](_pooled(features)) for features in seen])
        loss = self.vision_loss(student_VBK, teacher_GBK)
        if self.training:
            self.vision_loss.update_center(teacher_GBK)
        return loss

    @torch.no_grad()
    def _record(self, texts_BD: Tensor) -> None:
        """Keep running statistics of caption and patch embeddings over all workers, for centring and calibration.

        Each is the mean over all steps so far, and from the ``_MEMORY``-th on one that forgets: embeddings move as
        they learn.
        """
        model = self.model
        model.recorded_steps += 1
        share = max(1 / _MEMORY, 1 / int(model.recorded_steps))
        model.caption_mean.lerp_(mean_over_workers(texts_BD.mean(0)), share)
        patches_RF = self._undropped_BNF.flatten(0, 1)
        patches_RF = patches_RF[:: max(1, len(patches_RF) // _RECORDED_PATCHES)]
        patches_RD = F.normalize(model.image_projection(patches_RF), dim=-1)
        mean_D = mean_over_workers(patches_RD.mean(0))
        deviation_RD = patches_RD - mean_D
        covariance_DD = mean_over_workers(deviation_RD.T @ deviation_RD / len(deviation_RD))
        model.patch_mean.lerp_(mean_D, share)
        model.patch_covariance.lerp_(covariance_DD, share)


class ProjectionHead(nn.Module):
    """DINO's projection head: an MLP, a bottleneck of unit length, and a linear map to the prototypes (section 3.2)."""

    def __init__(self, features: int, hidden: int, prototypes: int, bottleneck: int = 64) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck))

    def forward(self, features_BF: Tensor) -> Tensor:
        """Shape: (B, F) -> (B, prototypes), cosines."""
        return F.normalize(self.mlp(features_BF), dim=-1) @ F.normalize(self.prototypes, dim=-1).T


def _pooled(features: ImageFeatures) -> Tensor:
    return features.patches.mean(1) if features.pooled is None else features.pooled


def _float32(features: ImageFeatures) -> ImageFeatures:
    pooled = None if features.pooled is None else features.pooled.float()
    return features._replace(patches=features.patches.float(), pooled=pooled)


def _cached_features(patches_BNF: Tensor) -> ImageFeatures:
    side = math.isqrt(patches_BNF.shape[1])  # pictures are cached from a square canvas
    return ImageFeatures(patches_BNF.float(), None, (side, patches_BNF.shape[1] // side))
