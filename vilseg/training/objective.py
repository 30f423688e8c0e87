"""The training objective: a batch of pairs in, its losses out. This is what data-parallel training wraps.

It has three parts, so that ``vilseg.training.grad_cache`` can put a batch together from chunks: texts are embedded; pictures are
brought to representations, which are all that the losses need of them (similarities with the texts rather than patches, sums
over pictures where a loss is one); and the losses are taken of the representations of the whole batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vilseg.config import ViewsConfig
from vilseg.config.loss import LossConfig
from vilseg.data.views import align
from vilseg.distributed import gather_rows, mean_over_workers, world_size
from vilseg.errors import ConfigError
from vilseg.losses import (
    DINOLoss,
    cluster_metrics,
    contrastive_loss,
    contrastive_loss_from_scores,
    crop_info_nce_loss,
    iic_loss_from_joints,
    multi_label_loss,
    sigmoid_loss,
    sigmoid_loss_from_scores,
    softmax_pooled_scores,
    top_k_pooled_scores,
    unnormalized_joints,
)
from vilseg.model import ImageFeatures, ViLSeg
from vilseg.training.batch import EncodedViews, TensorBatch, as_float32, encode_views, pooled_features
from vilseg.training.ema_teacher import EMATeacher, ProjectionHead
from vilseg.training.feature_dropout import logits_with_feature_dropout
from vilseg.training.pseudo_labels import PseudoLabeler, pseudo_label_losses

_MEMORY = 100
"""Steps that the running statistics look back on."""
_RECORDED_PATCHES = 1024
"""Patches a step whose embeddings enter the statistics: enough for them, cheap beside the step itself."""
_START_BIAS = -10.0
"""Of the sigmoid contrast (SigLIP, Zhai et al. 2023, section 3.2)."""

Representations = dict[str, Tensor]
"""What the losses need of some pictures. Parts of a batch are put together along the first dimension; where there is no picture
in it, the parts are sums and the dimension is 1."""


class Objective(nn.Module):
    """The losses of ViL-Seg (section 3) and the multi-label noun contrast on one batch.

    Args:
        model: the student; trained in place.
        loss: weights, forms and temperatures; a loss of weight 0 costs nothing.
        views: augmentation.
        phrases: noun phrases of the corpus that batches refer to by index.
        autocast: dtype that the networks run in; float32 for none.
        self_training: let the model, as it is now, label patches for itself.
    """

    teacher: EMATeacher | None
    logit_bias: nn.Parameter | None
    overclustering_head: nn.Sequential | None
    _phrase_tokens_PT: Tensor

    def __init__(
        self,
        model: ViLSeg,
        loss: LossConfig,
        views: ViewsConfig,
        phrases: tuple[str, ...] = (),
        *,
        autocast: torch.dtype = torch.float32,
        self_training: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = loss
        self.views = views
        self.autocast = autocast
        tokens = model.text_encoder.tokenize(phrases)
        self.register_buffer("_phrase_tokens_PT", tokens, persistent=False)
        self._frozen_phrases_PF: Tensor | None = None
        self._labels: PseudoLabeler | None = None
        if self_training and loss.self_training.weight:
            self._labels = PseudoLabeler(model, tokens, loss.self_training.confidence)
        features = model.image_projection.in_features
        self.teacher = None
        if loss.vision.weight:
            prototypes = loss.vision.prototypes if loss.vision.form == "dino" else 0
            self.vision_head = ProjectionHead(features, loss.vision.hidden_dim, prototypes)
            if loss.vision.form == "dino":
                self.vision_loss = DINOLoss(
                    prototypes,
                    student_temperature=loss.vision.student_temperature,
                    teacher_temperature=loss.vision.teacher_temperature,
                    center_momentum=loss.vision.center_momentum,
                )
            self.teacher = EMATeacher(self._trained_encoder, self.vision_head)
        # Both serve training alone: they travel with its checkpoints, not with the model.
        sigmoid = loss.cross_modal.weight and loss.cross_modal.form == "sigmoid"
        # A model that began as SigLIP has its own, and keeps it.
        own = sigmoid and model.logit_bias is None
        self.register_parameter("logit_bias", nn.Parameter(torch.tensor(_START_BIAS)) if own else None)
        over = loss.mutual_information.overclusters if loss.mutual_information.weight else 0
        self.overclustering_head = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, over)) if over else None
        if not loss.mutual_information.weight:
            model.clustering_head.requires_grad_(False)

    def forward(self, batch: TensorBatch) -> dict[str, Tensor]:
        """Losses of this worker's share by name, each unweighted, and their weighted sum as ``loss``; and how the clusters share
        the patches.

        The mean of ``loss`` over the workers is that of the whole batch, and so is its gradient.
        """
        present_P = self.present_phrases(batch)
        captions_BD, phrases_PD = self.embed_captions(batch.tokens), self.embed_phrases(present_P)
        compared_QD = self.compared_with_patches(captions_BD)
        seen = self.represent(batch, compared_QD, phrases_PD, present_P, pairs=len(batch))
        losses = self.losses(seen, captions_BD, self.positives(batch, present_P))
        if self.training:
            self.update_statistics(seen, captions_BD)
        return losses

    @torch.no_grad()
    def update_teacher(self, progress: float) -> None:
        """Move the teacher towards the student; see :meth:`EMATeacher.update_from`."""
        if self.teacher is not None:
            start = self.config.vision.teacher_momentum
            self.teacher.update_from(self._trained_encoder, self.vision_head, start=start, progress=progress)

    def compile_encoders(self) -> None:
        """Have ``torch.compile`` make one program of each encoder; the weights keep their names."""
        encoders = [self.model.image_encoder, self.model.text_encoder]
        if self.teacher is not None and self._trained_encoder is not None:
            encoders.append(self.teacher["encoder"])
        for encoder in encoders:
            # Torch's own generator for dropout: chunks replay it, and a run resumes by it.
            encoder.compile(options={"fallback_random": True})

    # ---------------------------------------------------------------------------------------------------------- texts

    def embed_captions(self, tokens_BT: Tensor) -> Tensor:
        """Embeddings of captions from their tokens, or from cached features (B, F). Shape: -> (B, D), unit length."""
        if tokens_BT.is_floating_point():
            return self.model.embed_text(tokens_BT.float())
        with self._autocast():
            features = self.model.text_features(self.model.text_encoder.trim(tokens_BT))
        return self.model.embed_text(features.float())

    def present_phrases(self, batch: TensorBatch) -> Tensor:
        """Indices of the phrases that the captions of all workers hold, ascending; none without a loss on them."""
        if not self.config.nouns.weight and self._labels is None:
            return batch.phrases.new_empty(0)
        present = gather_rows(batch.phrases).unique()
        return present[present >= 0]

    def embed_phrases(self, present_P: Tensor) -> Tensor:
        """Embeddings of some phrases; a frozen text encoder is asked once for each. Shape: (P,) -> (P, D), unit length."""
        model = self.model
        if not len(present_P):
            return model.caption_mean.new_empty((0, model.embedding_dim))
        with self._autocast():
            if not model.config.text_encoder.frozen:
                features = model.text_features(model.text_encoder.trim(self._phrase_tokens_PT[present_P]))
            else:
                if self._frozen_phrases_PF is None:
                    chunks = self._phrase_tokens_PT.split(256)
                    self._frozen_phrases_PF = torch.cat([model.text_features(tokens).float() for tokens in chunks])
                features = self._frozen_phrases_PF[present_P]
        return model.embed_text(features.float())

    def compared_with_patches(self, captions_BD: Tensor) -> Tensor:
        """The captions that every picture's patches meet: those of all workers, or none. Shape: (B, D) -> (Q, D)."""
        cross_modal = self.config.cross_modal
        if cross_modal.weight and cross_modal.patch_share and cross_modal.patch_pooling == "softmax":
            return gather_rows(captions_BD)
        return captions_BD[:0]

    @staticmethod
    def positives(batch: TensorBatch, present_P: Tensor) -> Tensor:
        """Which pictures' captions hold which phrase. Shape: -> (B, P), bool."""
        none = len(present_P)  # a column more for where there is no phrase
        columns = torch.where(batch.phrases >= 0, torch.searchsorted(present_P, batch.phrases), none)
        positives = torch.zeros((len(batch), none + 1), dtype=torch.bool, device=batch.phrases.device)
        return positives.scatter_(1, columns, True)[:, :none]

    # ------------------------------------------------------------------------------------------------- representations

    def represent(
        self, batch: TensorBatch, compared_QD: Tensor, phrases_PD: Tensor, present_P: Tensor, *, pairs: int
    ) -> Representations:
        """What the losses need of some of the step's pictures.

        Args:
            batch: the pictures.
            compared_QD: see :meth:`compared_with_patches`.
            phrases_PD: embeddings of the phrases of the whole batch.
            present_P: their indices.
            pairs: of this worker's step, of which ``batch`` is a part.
        """
        config, model = self.config, self.model
        with self._autocast():
            seen = encode_views(
                model,
                batch,
                self.views,
                global_=2 if config.mutual_information.weight or config.vision.weight else 1,
                local=self.views.local_crops if config.vision.weight else 0,
                # Where the second view serves the clustering head alone, nothing flows back through its encoding.
                second_learns=config.vision.weight > 0 or config.mutual_information.train_encoder,
                drop=self.training,
            )
        found: Representations = {"recorded_RF": _sample(seen.global_[0], batch.seeds, pairs)}
        if config.cross_modal.weight:
            found["images_BD"] = model.embed_pooled(seen.global_[0]._replace(pooled=seen.pooled(0)))
        on_patches = config.cross_modal.weight and config.cross_modal.patch_share
        if on_patches or config.nouns.weight or self._labels is not None:  # embeddings of patches are most of the work
            patches_BND = model.embed_patches(seen.view(0))
        if on_patches and config.cross_modal.patch_pooling == "mean":
            found["patch_means_BD"] = F.normalize(patches_BND.mean(1), dim=-1)
        elif on_patches:
            temperature = config.cross_modal.pooling_temperature
            found["caption_scores_BQ"] = softmax_pooled_scores(patches_BND, compared_QD, temperature)
        if config.nouns.weight:
            found["noun_scores_BP"] = top_k_pooled_scores(patches_BND, phrases_PD, config.nouns.top_patches)
        if self._labels is not None:
            own_BP = self.positives(batch, present_P)
            labels_BN = self._labels(self._labelled_features(seen), present_P, own_BP)
            found["label_losses_B2"] = pseudo_label_losses(patches_BND, phrases_PD, labels_BN, model.scale)
        if config.mutual_information.weight:
            found |= self._joint_sums(seen)
        if config.vision.weight:
            found |= self._vision_representations(batch, seen)
        return found

    def _labelled_features(self, seen: EncodedViews) -> ImageFeatures:
        """What the labelling model sees in the first view."""
        assert self._labels is not None
        if self._trained_encoder is None or seen.cached:
            return as_float32(seen.global_[0])
        assert seen.pixels_GB3HW is not None
        with torch.no_grad(), self._autocast():
            return as_float32(self._labels.features(seen.pixels_GB3HW[0]))

    def _joint_sums(self, seen: EncodedViews) -> Representations:
        heads = {"joints_1SKK": self.model.clustering_head, "over_joints_1SKK": self.overclustering_head}
        views = [] if seen.cached else [seen.view(number) for number in range(2)]
        if not self.config.mutual_information.train_encoder:
            views = [view._replace(patches=view.patches.detach()) for view in views]
        found = {}
        for name, head in heads.items():
            if head is None:
                continue
            if seen.cached and seen.factors_GBF is not None:
                logits = list(logits_with_feature_dropout(head, seen.global_[0].patches, seen.factors_GBF[:2]))
            elif seen.cached:
                logits = [head(seen.global_[0].patches.float())] * 2
            else:
                logits = [head(view.patches) for view in views]
            found[name] = self._joints(seen, logits)
        return found

    def _joints(self, seen: EncodedViews, logits: list[Tensor]) -> Tensor:
        grids = [view.grid for view in seen.global_[:2]]
        radius = self.config.mutual_information.radius
        if radius >= min(grids[0]):
            raise ConfigError(
                f"loss.mutual_information.radius={radius} does not fit the {grids[0][0]} x {grids[0][1]} patches of a view; give "
                "a smaller one"
            )
        first, second = (
            x.softmax(-1).transpose(1, 2).unflatten(2, grid) for x, grid in zip(logits, grids, strict=True)
        )
        valid = None
        if seen.geometry_GB23 is not None:
            second, valid = align(second, seen.geometry_GB23[1], seen.geometry_GB23[0], grids[0])
        return unnormalized_joints(first, second, valid, radius=radius).unsqueeze(0)

    def _vision_representations(self, batch: TensorBatch, seen: EncodedViews) -> Representations:
        student_VBK = torch.stack(
            [
                *(self.vision_head(seen.pooled(number)) for number in range(len(seen.global_))),
                *(self.vision_head(pooled_features(view)) for view in seen.local),
            ]
        )
        teacher_GBK = self._ask_teacher(batch, seen)
        if self.config.vision.form == "infonce":
            return {"student_BVD": student_VBK.transpose(0, 1), "teacher_BGD": teacher_GBK.transpose(0, 1)}
        # Sums, as there may be tens of thousands of prototypes.
        return {
            "agreement_1": self.vision_loss(student_VBK, teacher_GBK).unsqueeze(0) * len(batch),
            "teacher_1K": teacher_GBK.mean(0).sum(0, keepdim=True),
        }

    @torch.no_grad()
    def _ask_teacher(self, batch: TensorBatch, seen: EncodedViews) -> Tensor:
        assert self.teacher is not None
        views = seen.global_
        if self._trained_encoder is not None and not seen.cached:
            assert seen.pixels_GB3HW is not None
            with self._autocast():
                views = [as_float32(self.teacher["encoder"](pixels)) for pixels in seen.pixels_GB3HW]
        return torch.stack([self.teacher["head"](pooled_features(view)) for view in views])

    # ---------------------------------------------------------------------------------------------------------- losses

    def losses(self, seen: Representations, captions_BD: Tensor, positives_BP: Tensor) -> dict[str, Tensor]:
        """What :meth:`forward` returns.

        Args:
            seen: representations of the share.
            captions_BD: embeddings of its captions.
            positives_BP: see :meth:`positives`.
        """
        config = self.config
        terms: dict[str, tuple[float, Tensor]] = {}
        if config.cross_modal.weight:
            terms["cross_modal"] = config.cross_modal.weight, self._cross_modal(seen, captions_BD)
        if config.nouns.weight:
            nouns = multi_label_loss(seen["noun_scores_BP"], positives_BP, self.model.scale)
            terms["nouns"] = config.nouns.weight, nouns
        if "label_losses_B2" in seen:
            # Over all workers: one may have no label at all.
            loss, labelled = mean_over_workers(seen["label_losses_B2"].sum(0))
            terms["self_training"] = config.self_training.weight, loss / labelled.clamp(min=1 / world_size())
        if config.mutual_information.weight:
            information = config.mutual_information
            for name, joints in (("mutual_information", "joints_1SKK"), ("overclustering", "over_joints_1SKK")):
                if joints in seen:
                    terms[name] = (
                        information.weight,
                        iic_loss_from_joints(seen[joints].sum(0), information.entropy_weight),
                    )
        if config.vision.weight:
            terms["vision"] = config.vision.weight, self._vision(seen, len(captions_BD))
        total = torch.stack([weight * value for weight, value in terms.values()]).sum()
        found = {"loss": total, **{f"loss/{name}": value.detach() for name, (_, value) in terms.items()}}
        if "joints_1SKK" in seen:
            found |= {f"clusters/{name}": value for name, value in cluster_metrics(seen["joints_1SKK"].sum(0)).items()}
        return found

    def _cross_modal(self, seen: Representations, captions_BD: Tensor) -> Tensor:
        share = self.config.cross_modal.patch_share
        loss = self._contrast(seen["images_BD"], captions_BD) * (1 - share)
        if share == 0:
            return loss
        if "patch_means_BD" in seen:
            return loss + share * self._contrast(seen["patch_means_BD"], captions_BD)
        scores_BQ, scale = seen["caption_scores_BQ"], self.model.scale
        if self._bias is not None:
            return loss + share * sigmoid_loss_from_scores(scores_BQ, scale, self._bias)
        return loss + share * contrastive_loss_from_scores(scores_BQ, scale)

    def _contrast(self, images_BD: Tensor, captions_BD: Tensor) -> Tensor:
        if self._bias is not None:
            return sigmoid_loss(images_BD, captions_BD, self.model.scale, self._bias)
        return contrastive_loss(images_BD, captions_BD, self.model.scale)

    def _vision(self, seen: Representations, pairs: int) -> Tensor:
        config = self.config.vision
        if config.form == "dino":
            return seen["agreement_1"].sum() / pairs
        student, teacher = seen["student_BVD"].transpose(0, 1), seen["teacher_BGD"].transpose(0, 1)
        return crop_info_nce_loss(student, teacher, config.student_temperature)

    @torch.no_grad()
    def update_statistics(self, seen: Representations, captions_BD: Tensor) -> None:
        """Once a step, after the losses: the teacher's centre, and statistics of embeddings over all workers.

        These, for centring and calibration, are each the mean over all steps so far, and from the ``_MEMORY``-th on one
        that forgets: embeddings move as they learn.
        """
        if "teacher_1K" in seen:
            self.vision_loss.update_center(seen["teacher_1K"].sum(0).view(1, 1, -1) / len(captions_BD))
        model = self.model
        model.recorded_steps += 1
        share = max(1 / _MEMORY, 1 / int(model.recorded_steps))
        model.caption_mean.lerp_(mean_over_workers(captions_BD.mean(0)), share)
        patches_RD = F.normalize(model.image_projection(seen["recorded_RF"]), dim=-1)
        mean_D = mean_over_workers(patches_RD.mean(0))
        deviation_RD = patches_RD - mean_D
        covariance_DD = mean_over_workers(deviation_RD.T @ deviation_RD / len(deviation_RD))
        model.patch_mean.lerp_(mean_D, share)
        model.patch_covariance.lerp_(covariance_DD, share)

    # --------------------------------------------------------------------------------------------------------- details

    @property
    def _bias(self) -> nn.Parameter | None:
        """Of the sigmoid contrast; None with InfoNCE."""
        if self.config.cross_modal.form != "sigmoid":
            return None
        return self.model.logit_bias if self.logit_bias is None else self.logit_bias

    @property
    def _trained_encoder(self) -> nn.Module | None:
        return None if self.model.config.image_encoder.frozen else self.model.image_encoder

    def _autocast(self) -> torch.autocast:
        enabled = self.autocast != torch.float32
        return torch.autocast(self.model.device.type, self.autocast if enabled else None, enabled=enabled)


def _sample(features: ImageFeatures, seeds_B: Tensor, pairs: int) -> Tensor:
    """Patch features of every picture for the statistics, as many as make ``_RECORDED_PATCHES`` of ``pairs`` pictures; which
    they are follows from the pair's seed, whatever chunk it is in. Shape: -> (R, F), without gradient."""
    patches_BNF = features.patches.detach()
    count = patches_BNF.shape[1]
    wanted = min(count, -(-_RECORDED_PATCHES // (pairs * world_size())))
    places = torch.arange(wanted, device=seeds_B.device) * (count // wanted)
    places_BM = (seeds_B.unsqueeze(1) + places) % count
    return patches_BNF.gather(1, places_BM.unsqueeze(2).expand(-1, -1, patches_BNF.shape[2])).flatten(0, 1).float()
