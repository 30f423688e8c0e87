"""What a model sees in pictures, before any class is asked for: named patches and the clusters they belong to.

A picture that is larger, at the size the model sees, than ``segmentation.window`` is seen through overlapping windows. With
the unit embeddings p^w_n and the assignments a^w_nk of a patch n in window w, and the windows' weights w_n, which sum to 1
(`vilseg.segmentation.sliding_window`, in patches for pixels),

    p_n = norm(sum_w w_n p^w_n),    a_nk = sum_w w_n a^w_nk

so that no seam is left, and everything behind, the regions of the whole picture too, goes on as after one pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vilseg.config import SegmentationConfig
from vilseg.device import has_bfloat16_units
from vilseg.model import ViLSeg
from vilseg.segmentation.sliding_window import WindowAxis


class DenseFeatures(NamedTuple):
    """What the encoder and the clustering head made of one picture: all that naming its pixels takes, whatever the classes."""

    pixels_3HW: Tensor
    """(3, H, W) uint8, the picture at the size that the model saw."""
    patches_ND: Tensor
    """(N, D) float32 unit length, row by row over the grid."""
    assignments_NK: Tensor
    """(N, K) float32, summing to 1 over K."""
    grid: tuple[int, int]


def patch_size(model: ViLSeg) -> int:
    """Side of a patch in pixels; pictures are brought to multiples of it."""
    return int(getattr(model.image_encoder, "patch_size", 32))


@torch.inference_mode()
def encode_images(model: ViLSeg, pixels_B3HW: Tensor, config: SegmentationConfig) -> list[DenseFeatures]:
    """Encode images of one size, in one pass or window by window.

    Args:
        model: in evaluation mode.
        pixels_B3HW: uint8 RGB on the model's device, sides whole patches. Shape: (B, 3, H, W).
        config: attention, window and overlap.
    """
    height, width = pixels_B3HW.shape[2:]
    if config.window is None or max(height, width) <= config.window:
        patches_BND, assignments_BNK, grid = _encode(model, pixels_B3HW, config)
    else:
        patches_BND, assignments_BNK, grid = _encode_windows(model, pixels_B3HW, config, config.window)
    parts = zip(pixels_B3HW, patches_BND, assignments_BNK, strict=True)
    return [DenseFeatures(pixels, patches, assignments, grid) for pixels, patches, assignments in parts]


def _encode(model: ViLSeg, pixels_B3HW: Tensor, config: SegmentationConfig) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """One pass. Shape: -> (B, N, D) unit length, (B, N, K), grid."""
    device = pixels_B3HW.device
    images = pixels_B3HW.float().div_(255)
    # Matrix units of recent CPUs and GPUs are several times faster in bfloat16; the comparison itself is not.
    with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16_units(device)):
        features, named_BNF = model.dense_features(images, config.attention)
    features = features._replace(patches=features.patches.float(), pooled=None)
    patches_BND = model.embed_patches(features._replace(patches=named_BNF.float()))
    return patches_BND, model.cluster_logits(features).softmax(-1), features.grid


def _encode_windows(
    model: ViLSeg, pixels_B3HW: Tensor, config: SegmentationConfig, window: int
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """The same by windows; they begin at whole patches, so that their grids lie on each other."""
    patch = patch_size(model)
    side = max(1, window // patch)
    overlap = side // 4 if config.overlap is None else min(config.overlap // patch, side // 2)
    rows, columns = (WindowAxis.cover(length // patch, side, overlap) for length in pixels_B3HW.shape[2:])
    grid = (rows.length, columns.length)
    sums: list[Tensor] = []
    for row, top in enumerate(rows.starts):
        for column, left in enumerate(columns.starts):
            bottom, right = top + rows.window, left + columns.window
            part = pixels_B3HW[:, :, top * patch : bottom * patch, left * patch : right * patch]
            *found, seen = _encode(model, part, config)
            assert seen == (rows.window, columns.window), "one embedding a patch"
            if not sums:
                sums = [one.new_zeros((len(one), *grid, one.shape[2])) for one in found]
            weights_hw = torch.outer(
                torch.from_numpy(rows.weights(row, top, bottom)), torch.from_numpy(columns.weights(column, left, right))
            )
            weights_hw1 = weights_hw.to(part.device, torch.float32).unsqueeze(2)
            for total, one in zip(sums, found, strict=True):
                total[:, top:bottom, left:right] += one.unflatten(1, seen) * weights_hw1
    patches_BhwD, assignments_BhwK = sums
    return F.normalize(patches_BhwD.flatten(1, 2), dim=-1), assignments_BhwK.flatten(1, 2), grid
