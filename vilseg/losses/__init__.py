"""Training losses, one file per loss: functions from tensors to a scalar that import nothing from the model.

Each loss is exact for any number of workers (see ``vilseg.distributed``) and computed in float32, or in float64 for float64
inputs. A loss on patches is split into two functions so that a large batch can be processed in chunks: the first computes scores
or sums from the patches of some images, the second computes the loss of the whole batch from them.
"""

from vilseg.losses.contrastive_loss import (
    contrastive_loss,
    contrastive_loss_from_scores,
    sigmoid_loss,
    sigmoid_loss_from_scores,
    softmax_pooled_scores,
)
from vilseg.losses.crop_info_nce_loss import crop_info_nce_loss
from vilseg.losses.dino_loss import DINOLoss
from vilseg.losses.iic_loss import cluster_metrics, iic_loss, iic_loss_from_joints, unnormalized_joints
from vilseg.losses.multi_label_loss import multi_label_loss, top_k_pooled_scores

__all__ = [
    "DINOLoss",
    "cluster_metrics",
    "contrastive_loss",
    "contrastive_loss_from_scores",
    "crop_info_nce_loss",
    "iic_loss",
    "iic_loss_from_joints",
    "multi_label_loss",
    "sigmoid_loss",
    "sigmoid_loss_from_scores",
    "softmax_pooled_scores",
    "top_k_pooled_scores",
    "unnormalized_joints",
]
