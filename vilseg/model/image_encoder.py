"""Image encoders: patch features from a Hugging Face model, a user's own module, or a small convolutional network.

Every encoder is a torch module with an attribute ``num_features: int`` and a method ``forward(images_B3HW) -> ImageFeatures``.
The input is RGB in 0..1; the encoder normalises pixels itself. A user's ``factory`` function must return such a module. Optional
members: a method ``checkpoint_activations()`` (see :meth:`vilseg.model.ViLSeg.checkpoint_activations`), and an attribute
``can_correlate = True`` together with a method ``correlated()`` like :meth:`HuggingFaceImageEncoder.correlated`.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

from vilseg import storage
from vilseg.config import ImageEncoderConfig
from vilseg.errors import ConfigError, ModelError
from vilseg.model.correlated_attention import LastBlock

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ImageFeatures(NamedTuple):
    """Features that an image encoder returns for a batch of images."""

    patches: Float[Tensor, "B N F"]
    """(B, N, F), feature of each patch, in row-major order of the grid."""
    pooled: Float[Tensor, "B F"] | None
    """(B, F), global feature of each image, such as a class token; None if the encoder has none (users take the mean patch)."""
    grid: tuple[int, int]
    """(h, w) with h x w = N."""


def build_image_encoder(config: ImageEncoderConfig, *, hf_config: dict[str, Any] | None = None) -> nn.Module:
    """Build the encoder that ``config`` describes; weights are random unless they come from a ``checkpoint`` or a ``factory``.

    Args:
        config: settings with a checkpoint, a factory or an architecture.
        hf_config: Hugging Face configuration that was saved with a vilseg model. If given, the encoder is built from it and no
            checkpoint is loaded, because the weights will be loaded from the vilseg model.

    Raises:
        ConfigError: unknown architecture, wrong sizes, or a factory that cannot be imported or does not return an encoder.
        ModelError: the checkpoint cannot be loaded.
    """
    if config.factory:
        return _from_factory(config.factory, config.factory_options)
    if hf_config is not None:
        model = model_from_config(hf_config["model_type"], hf_config, key="model.image_encoder")
        return HuggingFaceImageEncoder(model, head=config.head)
    if config.checkpoint:
        return _from_checkpoint(config.checkpoint, head=config.head)
    if config.architecture == "local_conv":
        try:
            return LocalConvEncoder(**config.sizes)
        except TypeError as error:
            raise ConfigError(f"model.image_encoder.sizes does not fit local_conv: {error}") from error
    model = model_from_config(config.architecture, config.sizes, key="model.image_encoder")
    return HuggingFaceImageEncoder(model, head=config.head)


class LocalConvEncoder(nn.Module):
    """Small convolutional network with a small receptive field, the default for training from scratch.

    The small receptive field is deliberate. If the feature of a patch depends on the whole scene and captions are the only
    supervision, the network learns to classify a patch by other objects that co-occur with the object in the patch.

    Args:
        width: number of channels of the patch features.
        depth: number of residual blocks at patch resolution; each widens the receptive field by (kernel - 1) x patch_size pixels.
        patch_size: side of a patch in pixels, a power of two; log2(patch_size) convolutions (3 x 3, stride 2) reduce the image
            to one position per patch.
        kernel: side of the convolution kernels in the residual blocks; must be odd.

    Raises:
        ConfigError: a size is not allowed.

    Example:
        >>> import torch
        >>> from vilseg.model.image_encoder import LocalConvEncoder
        >>> features = LocalConvEncoder(width=32, patch_size=8)(torch.rand(2, 3, 64, 96))
        >>> features.patches.shape, features.grid
        (torch.Size([2, 96, 32]), (8, 12))
    """

    def __init__(self, width: int = 128, depth: int = 2, patch_size: int = 4, kernel: int = 3) -> None:
        super().__init__()
        stages = patch_size.bit_length() - 1
        if patch_size != 2**stages or stages < 1:
            raise ConfigError(f"model.image_encoder.sizes.patch_size must be a power of two above 1, not {patch_size}")
        if width < patch_size // 2:
            raise ConfigError(f"model.image_encoder.sizes.width must be at least half of patch_size, not {width}")
        if kernel % 2 == 0:
            raise ConfigError(f"model.image_encoder.sizes.kernel must be odd, not {kernel}")
        self.num_features = width
        self.patch_size = patch_size
        layers: list[nn.Module] = []
        channels = 3
        for stage in range(stages):
            wider = width // 2 ** (stages - 1 - stage)
            layers += [nn.Conv2d(channels, wider, 3, stride=2, padding=1), ChannelNorm(wider), nn.GELU()]
            channels = wider
        self.stem = nn.Sequential(*layers)
        self.blocks = nn.Sequential(*[_ResidualBlock(width, kernel) for _ in range(depth)])
        self.norm = ChannelNorm(width)
        self._checkpointed = False
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's annotations

    def forward(self, images_B3HW: Float[Tensor, "B 3 H W"]) -> ImageFeatures:
        """Compute patch features. Shape: (B, 3, H, W) RGB in 0..1 -> patches (B, H/patch x W/patch, width)."""
        x_BFhw = (images_B3HW - 0.5) / 0.25
        for block in (self.stem, *self.blocks):
            recompute = self._checkpointed and torch.is_grad_enabled()
            x_BFhw = checkpoint(block, x_BFhw, use_reentrant=False) if recompute else block(x_BFhw)
        x_BFhw = self.norm(x_BFhw)
        return ImageFeatures(x_BFhw.flatten(2).transpose(1, 2), None, (x_BFhw.shape[2], x_BFhw.shape[3]))

    def checkpoint_activations(self) -> None:
        """Enable activation checkpointing: stem and blocks keep only their inputs and are recomputed in the backward pass."""
        self._checkpointed = True


class _ResidualBlock(nn.Sequential):
    # Dense convolutions learn textures of small images from fewer samples than depthwise ones of the same cost.
    def __init__(self, width: int, kernel: int) -> None:
        super().__init__(nn.Conv2d(width, width, kernel, padding=kernel // 2), ChannelNorm(width), nn.GELU())

    def forward(self, x_BFhw: Float[Tensor, "B F h w"]) -> Float[Tensor, "B F h w"]:
        return x_BFhw + super().forward(x_BFhw)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, F, h, w); unlike with batch norm, samples of a batch do not affect each other."""

    def forward(self, x_BFhw: Float[Tensor, "B F h w"]) -> Float[Tensor, "B F h w"]:
        """Normalise the channels at every position. Shape: (B, F, h, w) -> same."""
        return super().forward(x_BFhw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class HuggingFaceImageEncoder(nn.Module):
    """Image encoder with a transformers vision model.

    Its patches are the tokens of the last layer without class and register tokens, or the positions of the feature map.

    If ``head`` is True, the tokens of CLIP and SigLIP also go through the layers between the last block and the space of the
    texts. CLIP: the last norm, which was trained on the class token. SigLIP: its attention pooling gives the global feature, and
    each patch goes through the pooling's value projection, which equals pooling that patch alone (as in MaskCLIP, Zhou et al.
    2022, section 3.2).

    Args:
        model: vision model, or a model with an attribute ``vision_model``.
        mean: mean of each channel for the normalisation of pixels in 0..1.
        std: standard deviation of each channel for the normalisation.
        head: apply these layers of CLIP and SigLIP.

    Raises:
        ConfigError: ``head`` is True for a model without such layers.
    """

    model: Any
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        head: bool = False,
    ) -> None:
        super().__init__()
        self.model = getattr(model, "vision_model", model)  # CLIP and SigLIP
        if getattr(self.model, "pooler", None) is not None:
            self.model.pooler = None  # its weights would never be trained
        config = self.model.config
        siglip = config.model_type in ("siglip_vision_model", "siglip2_vision_model")
        if head and not (config.model_type == "clip_vision_model" or (siglip and config.vision_use_head)):
            raise ConfigError(
                f"model.image_encoder.head needs the image tower of CLIP, SigLIP or SigLIP 2 with its head; "
                f"this {config.model_type} has none"
            )
        self._norm = head and not siglip
        self._pooling = head and siglip
        hidden = getattr(config, "hidden_size", None) or config.hidden_sizes[-1]
        self.num_features: int = hidden
        # Convolutional backbones halve the image in every stage; 32 is a multiple of the stride of each of them.
        patch: Any = config.patch_size if hasattr(config, "num_attention_heads") else 32
        self.patch_size: int = patch if isinstance(patch, int) else patch[0]
        parameters = _parameters(self.model)
        self._takes_patches = "spatial_shapes" in parameters  # SigLIP 2 with naflex input, for images of any shape
        # Most transformers interpolate their position embeddings on demand, some (DINOv2) always and without a flag.
        flag = "interpolate_pos_encoding"
        self._options = {flag: True} if flag in parameters else {}
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    @property
    def hf_config(self) -> dict[str, Any]:
        """Hugging Face configuration, from which the architecture can be rebuilt without its checkpoint."""
        return self.model.config.to_dict()

    def forward(self, images_B3HW: Float[Tensor, "B 3 H W"]) -> ImageFeatures:
        """Compute patch features and, if the model has one, the global feature. Shape: (B, 3, H, W) in 0..1 -> (B, N, F), (B, F).

        Position embeddings are interpolated to the size of the image.
        """
        output, grid = self._run(images_B3HW)
        return self._features(output.last_hidden_state, output, grid)

    @property
    def can_correlate(self) -> bool:
        """True if :meth:`correlated` supports this architecture."""
        return LastBlock.find(self.model) is not None

    def correlated(
        self, images_B3HW: Float[Tensor, "B 3 H W"], attention: Literal["sclip", "naclip"]
    ) -> tuple[ImageFeatures, Float[Tensor, "B N F"]]:
        """Compute the features of `forward` and, in the same pass, patch features with another attention in the last block.

        Args:
            images_B3HW: RGB in 0..1. Shape: (B, 3, H, W).
            attention: variant; see ``vilseg.model.correlated_attention``.

        Returns:
            The features of `forward`, and the patch features with the other attention (B, N, F).
        """
        block = LastBlock.find(self.model)
        assert block is not None, "ask can_correlate first"
        with block.captured_input() as inputs:
            output, grid = self._run(images_B3HW)
        features = self._features(output.last_hidden_state, output, grid)
        return features, self._features(block(inputs[0], grid, attention), output, grid).patches

    def _run(self, images_B3HW: Float[Tensor, "B 3 H W"]) -> tuple[Any, tuple[int, int]]:
        """Run the model on images; return its output and the patch grid (h, w)."""
        pixels = (images_B3HW - self.mean) / self.std
        grid = (images_B3HW.shape[2] // self.patch_size, images_B3HW.shape[3] // self.patch_size)
        inputs = _as_patches(pixels, grid, self.patch_size) if self._takes_patches else {"pixel_values": pixels}
        return self.model(**inputs, **self._options), grid

    def _features(self, tokens: Tensor, output: Any, grid: tuple[int, int]) -> ImageFeatures:
        """Convert a last hidden state to features; the global feature is taken from ``output`` if it is not one of the tokens."""
        if tokens.ndim == 4:
            return ImageFeatures(tokens.flatten(2).transpose(1, 2), None, (tokens.shape[2], tokens.shape[3]))
        if self._pooling:
            return ImageFeatures(self._pool_each(tokens), output.pooler_output, grid)
        if self._norm:
            tokens = self.model.post_layernorm(tokens)
        prefix = tokens.shape[1] - grid[0] * grid[1]  # class and register tokens come first
        return ImageFeatures(tokens[:, prefix:], tokens[:, 0] if prefix else None, grid)

    def checkpoint_activations(self) -> None:
        """Enable activation checkpointing: layers keep only their inputs and are recomputed in the backward pass.

        Raises:
            ConfigError: the model has no layers that support it.
        """
        checkpoint_layers(self.model, key="model.image_encoder")

    def _pool_each(self, tokens_BNF: Float[Tensor, "B N F"]) -> Float[Tensor, "B N F"]:
        """Apply the attention pooling to each token alone, so its attention weight is 1. Shape: (B, N, F) -> same."""
        head = self.model.head
        values = slice(2 * head.attention.embed_dim, None)
        weight, bias = head.attention.in_proj_weight[values], head.attention.in_proj_bias[values]
        pooled_BNF = head.attention.out_proj(F.linear(tokens_BNF, weight, bias))
        return pooled_BNF + head.mlp(head.layernorm(pooled_BNF))


def _as_patches(pixels_B3HW: Float[Tensor, "B 3 H W"], grid: tuple[int, int], patch: int) -> dict[str, Tensor]:
    """Build the input of SigLIP 2: flattened patches (B, N, patch² x 3), channels fastest, with the grid and a mask of ones."""
    (h, w), count = grid, pixels_B3HW.shape[0]  # ONNX export traces shapes, but not len()
    cut = pixels_B3HW[:, :, : h * patch, : w * patch].unflatten(3, (w, patch)).unflatten(2, (h, patch))
    patches_BNF = cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    return {
        "pixel_values": patches_BNF,
        # transformers reads single numbers of this tensor; on the CPU that needs no synchronisation with the GPU.
        "spatial_shapes": torch.tensor([grid]).expand(count, 2),
        "pixel_attention_mask": torch.ones(count, h * w, dtype=torch.long, device=pixels_B3HW.device),
    }


def checkpoint_layers(model: nn.Module, *, key: str, optional: bool = False) -> None:
    """Enable activation checkpointing in a transformers model: layers are recomputed in the backward pass.

    Args:
        model: complete model, or one encoder of it (which transformers' own method for this does not support).
        key: configuration key of the model, for error messages.
        optional: if True, a model without layers that support checkpointing is accepted and left unchanged.

    Raises:
        ConfigError: no layer supports checkpointing, and ``optional`` is False.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer  # slow to import, and needed only here

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers and not optional:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ConfigError(
            f"trainer.checkpoint_activations cannot be used: {key} ({kind}) has no layers that transformers can compute "
            "again; choose another encoder, or set trainer.checkpoint_activations=false"
        )
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]  # set by transformers


def _parameters(model: nn.Module) -> set[str]:
    """Return the argument names of a model's ``forward`` method as written, before transformers' decorators wrap it."""
    return set(inspect.signature(inspect.unwrap(model.forward)).parameters)


def model_from_config(model_type: str, values: dict[str, Any], *, key: str) -> nn.Module:
    """Build a transformers model with random weights.

    Args:
        model_type: model type of transformers, such as ``vit``.
        values: settings of its configuration class.
        key: configuration key of the model, for error messages.

    Raises:
        ConfigError: transformers has no such model type, or its configuration does not accept ``values``.
    """
    if model_type not in CONFIG_MAPPING:
        ours = "neither local_conv nor" if key.endswith("image_encoder") else "not"
        raise ConfigError(f"{key}.architecture '{model_type}' is {ours} a model type of transformers")
    try:
        config = AutoConfig.for_model(model_type, **{k: v for k, v in values.items() if k != "model_type"})
        if model_type in ("siglip_text_model", "siglip2_text_model"):  # AutoModel does not support these
            from transformers import Siglip2TextModel, SiglipTextModel

            model_class: Any = SiglipTextModel if model_type == "siglip_text_model" else Siglip2TextModel
            return model_class(config)
        return AutoModel.from_config(config)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ConfigError(f"{key}.sizes does not fit {model_type}: {' '.join(str(error).split())}") from error


def _from_checkpoint(checkpoint: str, *, head: bool) -> HuggingFaceImageEncoder:
    with checkpoint_folder(checkpoint) as folder:
        try:
            # Many checkpoints are published in half precision, but training needs float32 weights.
            model = AutoModel.from_pretrained(folder, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"model.image_encoder.checkpoint {checkpoint} cannot be loaded: {first_line(error)}"
            ) from error
        mean, std = read_normalisation(folder)
    return HuggingFaceImageEncoder(model, mean=mean, std=std, head=head)


@contextmanager
def checkpoint_folder(checkpoint: str) -> Iterator[str]:
    """Yield a name that transformers can load: the path of a temporary copy of a URI, or a local path or hub id unchanged."""
    if "://" not in checkpoint:
        yield checkpoint
        return
    with storage.local_copy(checkpoint) as folder:
        yield str(folder)


def read_normalisation(
    folder: str, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Read mean and standard deviation of the pixel normalisation from a folder or hub id.

    If the folder has none, ``mean`` and ``std`` are returned.
    """
    names = ("preprocessor_config.json", "processor_config.json")
    if Path(folder).is_dir() and not any((Path(folder) / name).exists() for name in names):
        return mean, std
    from transformers import AutoImageProcessor  # takes seconds to import, and is needed only for checkpoints

    processor = AutoImageProcessor.from_pretrained(folder)
    return tuple(processor.image_mean), tuple(processor.image_std)


def _from_factory(path: str, options: dict[str, Any]) -> nn.Module:
    module_name, separator, function = path.partition(":")
    if not separator:
        raise ConfigError(f"model.image_encoder.factory is '{path}'; write it as module:function")
    # The factory may be named by an untrusted model folder: allow only functions that were written as factories.
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        raise ConfigError(
            f"model.image_encoder.factory '{path}' is no factory: {module_name} is a module of Python itself"
        )
    try:
        factory = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model.image_encoder.factory '{path}' cannot be imported: {error}") from error
    home = getattr(factory, "__module__", None)
    if home != module_name:
        hint = f"name it by {home}, which defines it" if home else "name a function or class of that module"
        raise ConfigError(f"model.image_encoder.factory '{path}' is not defined in {module_name}; {hint}")
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise ConfigError(f"model.image_encoder.factory_options does not fit '{path}': {error}") from error
    encoder = factory(**options)
    if not isinstance(encoder, nn.Module) or not hasattr(encoder, "num_features"):
        raise ConfigError(f"model.image_encoder.factory '{path}' must return a torch module with 'num_features'")
    return encoder


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, without its full stop."""
    return str(error).strip().split("\n")[0].rstrip(".")
