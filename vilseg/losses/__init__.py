"""One file a loss: tensors in, scalar out, nothing imported from the model.

Each loss is exact over any number of workers (see ``vilseg.distributed``) and computed in float32. Those on patches come in two
parts as well, what each image gives and the loss of that, so that a large batch can be seen chunk by chunk.
"""

from vilseg.losses.contrastive_loss import (
    contrast,
    contrast_of_scores,
    patch_contrast,
    patch_scores,
    sigmoid_contrast,
    sigmoid_contrast_of_scores,
)
from vilseg.losses.dino_loss import VisionContrast, vision_info_nce
from vilseg.losses.iic_loss import cluster_figures, information_loss, joint_sums, mutual_information_loss
from vilseg.losses.multi_label_loss import noun_contrast, noun_contrast_of_scores, noun_scores

__all__ = [
    "VisionContrast",
    "cluster_figures",
    "contrast",
    "contrast_of_scores",
    "information_loss",
    "joint_sums",
    "mutual_information_loss",
    "noun_contrast",
    "noun_contrast_of_scores",
    "noun_scores",
    "patch_contrast",
    "patch_scores",
    "sigmoid_contrast",
    "sigmoid_contrast_of_scores",
    "vision_info_nce",
]
