"""IIC term: mutual information between the cluster assignments of two views, which trains the clustering head."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from vilseg.config.loss import MutualInformationConfig
from vilseg.data.views import align
from vilseg.errors import ConfigError
from vilseg.losses import cluster_metrics, iic_loss_from_joints, unnormalized_joints
from vilseg.model import ViLSeg
from vilseg.training.encoded_texts import OwnTexts
from vilseg.training.encoded_views import EncodedViews
from vilseg.training.feature_dropout import logits_with_feature_dropout
from vilseg.training.terms.term import EncodedImages, Needs, SummedTerm


class ClusterRepresentations(NamedTuple):
    """Unnormalised joint distributions of the assignments of two views for each displacement, summed over images."""

    joints_OKK: Tensor
    """Joint distributions of the clustering head."""
    overclustering_joints_OKK: Tensor | None
    """Joint distributions of the overclustering head; None if there is none."""


class ClusterTerm(SummedTerm[ClusterRepresentations]):
    """IIC loss of the clustering head; ``loss.mutual_information`` in the configuration.

    Args:
        model: the student, whose clustering head is trained.
        config: weights, largest displacement, and the number of outputs of the overclustering head.
    """

    def __init__(self, model: ViLSeg, config: MutualInformationConfig) -> None:
        self.weight = config.weight
        self._model, self._config = model, config
        # If only the head is trained, the second view is encoded without gradient.
        self.needs = Needs(global_views=2, second_view_gradient=config.train_encoder)
        features, clusters = model.image_projection.in_features, config.overclusters
        head = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, clusters)) if clusters else None
        self._overclustering_head = head

    def modules(self) -> dict[str, nn.Module]:
        """Return the overclustering head, if there is one; it is used in training only and not saved with the model."""
        return {} if self._overclustering_head is None else {"overclustering_head": self._overclustering_head}

    def represent(self, images: EncodedImages) -> ClusterRepresentations:
        """Compute the joint distributions of each head, summed over images."""
        joints = self._joints(images.views, self._model.clustering_head)
        if self._overclustering_head is None:
            return ClusterRepresentations(joints, None)
        return ClusterRepresentations(joints, self._joints(images.views, self._overclustering_head))

    def losses(self, representations: ClusterRepresentations, texts: OwnTexts) -> dict[str, Tensor]:
        """Return the IIC loss of each head."""
        names = ("mutual_information", "overclustering")
        return {
            name: iic_loss_from_joints(joints, self._config.entropy_weight)
            for name, joints in zip(names, representations, strict=True)
            if joints is not None
        }

    def metrics(self, representations: ClusterRepresentations) -> dict[str, Tensor]:
        """Return the metrics of :func:`cluster_metrics` for the clustering head."""
        return {f"clusters/{name}": value for name, value in cluster_metrics(representations.joints_OKK).items()}

    def _joints(self, views: EncodedViews, head: nn.Sequential) -> Tensor:
        grids = [view.grid for view in views.global_[:2]]
        radius = self._config.radius
        if radius >= min(grids[0]):
            raise ConfigError(
                f"loss.mutual_information.radius={radius} does not fit the {grids[0][0]} x {grids[0][1]} patches of a view; give "
                "a smaller one"
            )
        first, second = (
            logits_BNK.softmax(-1).transpose(1, 2).unflatten(2, grid)
            for logits_BNK, grid in zip(self._logits(views, head), grids, strict=True)
        )
        valid = None
        if views.geometry_GB23 is not None:
            second, valid = align(second, views.geometry_GB23[1], views.geometry_GB23[0], grids[0])
        return unnormalized_joints(first, second, valid, radius=radius)

    def _logits(self, views: EncodedViews, head: nn.Sequential) -> list[Tensor]:
        """Return the cluster logits of the patches of the two views. Shape: two (B, N, K)."""
        if views.cached and views.factors_GBF is not None:
            return list(logits_with_feature_dropout(head, views.global_[0].patches, views.factors_GBF[:2]))
        if views.cached:
            return [head(views.global_[0].patches.float())] * 2
        patches = [views.view(number).patches for number in range(2)]
        if not self._config.train_encoder:
            patches = [view_BNF.detach() for view_BNF in patches]
        return [head(view_BNF) for view_BNF in patches]
