"""Encode images for segmentation: patch embeddings and cluster assignments, which do not depend on the classes.

An image whose longer side, resized to the model's input, exceeds ``segmentation.window`` is encoded in overlapping windows. With
the unit embeddings p^w_n and the assignments a^w_nk of patch n in window w, and the blending weights b^w_n of the windows, which
sum to 1 at each patch (`vilseg.segmentation.sliding_window`, with patches instead of pixels), the blended values are

    p_n = norm(sum_w b^w_n p^w_n),    a_nk = sum_w b^w_n a^w_nk.

They have no visible seams, and everything after them, including the regions of the whole image, is computed as after one pass.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from vilseg.config import SegmentationConfig
from vilseg.device import has_bfloat16_units
from vilseg.model import ViLSeg
from vilseg.segmentation.sliding_window import WindowAxis

_PIXELS_PER_PASS = 1 << 23
"""Maximum number of input pixels in one pass of the image encoder: 41 images of 448 x 448. It bounds the memory for any number of
images; larger passes would not be faster."""


class DenseFeatures(NamedTuple):
    """Outputs of the image encoder and the clustering head for one image: the input of segmentation for any set of classes."""

    pixels_3HW: Tensor
    """The image at the size of the model's input. Shape: (3, H, W), uint8."""
    patches_ND: Tensor
    """Patch embeddings, in row-major order of the grid, unit length. Shape: (N, D), float32."""
    assignments_NK: Tensor
    """Soft assignments to the clusters, summing to 1 over K. Shape: (N, K), float32."""
    grid: tuple[int, int]
    """(h, w) with h x w = N."""

    def to(self, device: torch.device) -> "DenseFeatures":
        """Return a copy with all tensors on ``device``."""
        return DenseFeatures(
            self.pixels_3HW.to(device), self.patches_ND.to(device), self.assignments_NK.to(device), self.grid
        )


def patch_size(model: ViLSeg) -> int:
    """Return the side of a patch in pixels; images are resized to multiples of it."""
    return int(getattr(model.image_encoder, "patch_size", 32))


def passes(sizes: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """Yield groups of images to encode in one pass: of equal size, with at most `_PIXELS_PER_PASS` pixels, or a single image.

    Args:
        sizes: (height, width) of each image at the model's input, in pixels.

    Returns:
        Indices of the images in each pass; each image is in exactly one pass.

    Example:
        >>> list(passes([(64, 64), (64, 96), (64, 64)]))
        [[0, 2], [1]]
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, size in enumerate(sizes):
        groups.setdefault(size, []).append(index)
    for (height, width), members in groups.items():
        count = max(1, _PIXELS_PER_PASS // (height * width))
        for start in range(0, len(members), count):
            yield members[start : start + count]


@torch.inference_mode()
def encode_images(
    model: ViLSeg, pixels_B3HW: UInt8[Tensor, "B 3 H W"], config: SegmentationConfig
) -> list[DenseFeatures]:
    """Encode images of the same size, in one pass or in overlapping windows.

    Args:
        model: model in evaluation mode.
        pixels_B3HW: RGB images on the model's device; H and W are multiples of the patch size. Shape: (B, 3, H, W), uint8.
        config: settings attention, window and overlap.
    """
    height, width = pixels_B3HW.shape[2:]
    if config.window is None or max(height, width) <= config.window:
        patches_BND, assignments_BNK, grid = _encode(model, pixels_B3HW, config)
    else:
        patches_BND, assignments_BNK, grid = _encode_windows(model, pixels_B3HW, config, config.window)
    parts = zip(pixels_B3HW, patches_BND, assignments_BNK, strict=True)
    return [DenseFeatures(pixels, patches, assignments, grid) for pixels, patches, assignments in parts]


def _encode(
    model: ViLSeg, pixels_B3HW: Tensor, config: SegmentationConfig
) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B N K"], tuple[int, int]]:
    """Encode images in one pass. Shape: -> patch embeddings (B, N, D), assignments (B, N, K), grid (h, w)."""
    device = pixels_B3HW.device
    images = pixels_B3HW.float().div_(255)
    # Matrix units of recent CPUs and GPUs are several times faster in bfloat16; the comparison with texts stays in float32.
    with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16_units(device)):
        features, text_patches_BNF = model.dense_features(images, config.attention)
    features = features._replace(patches=features.patches.float(), pooled=None)
    patches_BND = model.embed_patches(features._replace(patches=text_patches_BNF.float()))
    return patches_BND, model.cluster_logits(features).softmax(-1), features.grid


def _encode_windows(
    model: ViLSeg, pixels_B3HW: Tensor, config: SegmentationConfig, window: int
) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B N K"], tuple[int, int]]:
    """Encode images in windows that begin at patch boundaries, so that their patches are patches of the image's grid."""
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
            *encoded, window_grid = _encode(model, part, config)
            assert window_grid == (rows.window, columns.window), "one embedding a patch"
            if not sums:
                sums = [maps.new_zeros((len(maps), *grid, maps.shape[2])) for maps in encoded]
            weights_hw = torch.outer(
                torch.from_numpy(rows.weights(row, top, bottom)), torch.from_numpy(columns.weights(column, left, right))
            )
            weights_hw1 = weights_hw.to(part.device, torch.float32).unsqueeze(2)
            for total, maps in zip(sums, encoded, strict=True):
                total[:, top:bottom, left:right] += maps.unflatten(1, window_grid) * weights_hw1
    patches_BhwD, assignments_BhwK = sums
    return F.normalize(patches_BhwD.flatten(1, 2), dim=-1), assignments_BhwK.flatten(1, 2), grid
