"""Image encoders: patch features from a Hugging Face model, from a user's own module, or from a small network of ours.

Every encoder is a module with ``num_features: int`` and ``forward(images_B3HW) -> ImageFeatures``, its input RGB in 0..1;
normalisation is its own affair. That is also the contract of a ``factory``, which may have a method ``checkpoint_activations()``
beside, see :meth:`vilseg.model.ViLSeg.checkpoint_activations`, and where it has ``can_correlate = True`` has a method
``correlated()`` as :meth:`HuggingFaceImageEncoder.correlated`.
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
    """What an encoder sees in a batch of images."""

    patches: Float[Tensor, "B N F"]
    """(B, N, F), row by row over the grid."""
    pooled: Float[Tensor, "B F"] | None
    """(B, F) global feature (class token); None where the encoder has none, and the mean of the patches stands in."""
    grid: tuple[int, int]
    """(h, w) with h x w = N."""


def build_image_encoder(config: ImageEncoderConfig, *, hf_config: dict[str, Any] | None = None) -> nn.Module:
    """Make the encoder that ``config`` describes; weights are loaded only for ``checkpoint`` and by a ``factory``.

    Args:
        config: one of checkpoint, factory, architecture.
        hf_config: the Hugging Face configuration saved with a vilseg model; builds that architecture without its
            checkpoint, whose weights are about to be loaded from the vilseg model.

    Raises:
        ConfigError: unknown architecture, wrong sizes, or a factory that cannot be imported or is no encoder.
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
    """A small convolutional network with a small receptive field, the default from scratch.

    Locality is the point: with caption supervision alone a network that sees the whole scene from every patch learns to
    name what co-occurs instead of what is there.

    Args:
        width: channels of the patch features.
        depth: residual blocks at patch resolution; each widens the receptive field by (kernel - 1) x patch_size pixels.
        patch_size: pixels a patch, a power of two; reached by 3 x 3 convolutions of stride 2.
        kernel: side of the blocks' convolutions, odd.
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
        """Shape: (B, 3, H, W) in 0..1 -> patches (B, H/patch x W/patch, width)."""
        x_BFhw = (images_B3HW - 0.5) / 0.25
        for block in (self.stem, *self.blocks):
            again = self._checkpointed and torch.is_grad_enabled()
            x_BFhw = checkpoint(block, x_BFhw, use_reentrant=False) if again else block(x_BFhw)
        x_BFhw = self.norm(x_BFhw)
        return ImageFeatures(x_BFhw.flatten(2).transpose(1, 2), None, (x_BFhw.shape[2], x_BFhw.shape[3]))

    def checkpoint_activations(self) -> None:
        """Keep only what goes into the stem and the blocks, and compute the rest again in the backward pass."""
        self._checkpointed = True


class _ResidualBlock(nn.Sequential):
    # Dense convolutions learn small pictures' textures in fewer samples than depthwise ones of the same cost.
    def __init__(self, width: int, kernel: int) -> None:
        super().__init__(nn.Conv2d(width, width, kernel, padding=kernel // 2), ChannelNorm(width), nn.GELU())

    def forward(self, x_BFhw: Float[Tensor, "B F h w"]) -> Float[Tensor, "B F h w"]:
        return x_BFhw + super().forward(x_BFhw)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, F, h, w); unlike batch norm it keeps every sample independent of its batch."""

    def forward(self, x_BFhw: Float[Tensor, "B F h w"]) -> Float[Tensor, "B F h w"]:
        """Shape: (B, F, h, w) -> same."""
        return super().forward(x_BFhw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class HuggingFaceImageEncoder(nn.Module):
    """Patch features of a transformers vision model: transformer tokens without class and register tokens, or a feature map.

    With ``head`` the tokens of CLIP and SigLIP go on through what led to the space of the texts. CLIP: its last norm, which
    it learnt on the class token. SigLIP: its attention pooling gives the image as a whole, and of every patch what it
    gives where that patch is all it sees, which is its value path (as MaskCLIP does, Zhou et al. 2022, section 3.2).

    Args:
        model: a vision model, or a model with an image half.
        mean, std: that pixels in 0..1 are normalised by.
        head: see above.

    Raises:
        ConfigError: ``head`` for a model that has none.
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
        self.model = getattr(model, "vision_model", model)  # the image half of CLIP and SigLIP
        if getattr(self.model, "pooler", None) is not None:
            self.model.pooler = None  # weights that nothing would train
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
        # Convolutional backbones halve the picture in every stage; 32 is a multiple of what any of them wants.
        patch: Any = config.patch_size if hasattr(config, "num_attention_heads") else 32
        self.patch_size: int = patch if isinstance(patch, int) else patch[0]
        parameters = _parameters(self.model)
        self._takes_patches = "spatial_shapes" in parameters  # SigLIP 2 in its form for pictures of any shape
        # Most transformers interpolate their position embeddings on demand, some (DINOv2) always and without a flag.
        flag = "interpolate_pos_encoding"
        self._options = {flag: True} if flag in parameters else {}
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    @property
    def hf_config(self) -> dict[str, Any]:
        """What rebuilds the architecture without its checkpoint."""
        return self.model.config.to_dict()

    def forward(self, images_B3HW: Float[Tensor, "B 3 H W"]) -> ImageFeatures:
        """Shape: (B, 3, H, W) in 0..1 -> patches (B, N, F); position embeddings are interpolated to the image's size."""
        output, grid = self._run(images_B3HW)
        return self._features(output.last_hidden_state, output, grid)

    @property
    def can_correlate(self) -> bool:
        """Whether the last block is of a form that :meth:`correlated` knows."""
        return LastBlock.of(self.model) is not None

    def correlated(
        self, images_B3HW: Float[Tensor, "B 3 H W"], attention: Literal["sclip", "naclip"]
    ) -> tuple[ImageFeatures, Float[Tensor, "B N F"]]:
        """Features as `forward` gives them, and from the same pass patches with another attention in the last block.

        Args:
            images_B3HW: RGB in 0..1. Shape: (B, 3, H, W).
            attention: see ``vilseg.model.correlated_attention``.

        Returns:
            The features, and patches of the same shape.
        """
        block = LastBlock.of(self.model)
        assert block is not None, "ask can_correlate first"
        with block.watched() as entering:
            output, grid = self._run(images_B3HW)
        features = self._features(output.last_hidden_state, output, grid)
        return features, self._features(block(entering[0], grid, attention), output, grid).patches

    def _run(self, images_B3HW: Float[Tensor, "B 3 H W"]) -> tuple[Any, tuple[int, int]]:
        """What the model makes of images, and the patch grid."""
        pixels = (images_B3HW - self.mean) / self.std
        grid = (images_B3HW.shape[2] // self.patch_size, images_B3HW.shape[3] // self.patch_size)
        seen = _as_patches(pixels, grid, self.patch_size) if self._takes_patches else {"pixel_values": pixels}
        return self.model(**seen, **self._options), grid

    def _features(self, tokens: Tensor, output: Any, grid: tuple[int, int]) -> ImageFeatures:
        """Features that a last hidden state holds; ``output`` has the image as a whole where the tokens do not."""
        if tokens.ndim == 4:
            return ImageFeatures(tokens.flatten(2).transpose(1, 2), None, (tokens.shape[2], tokens.shape[3]))
        if self._pooling:
            return ImageFeatures(self._pool_each(tokens), output.pooler_output, grid)
        if self._norm:
            tokens = self.model.post_layernorm(tokens)
        prefix = tokens.shape[1] - grid[0] * grid[1]  # class and register tokens come first
        return ImageFeatures(tokens[:, prefix:], tokens[:, 0] if prefix else None, grid)

    def checkpoint_activations(self) -> None:
        """Keep only what goes into the layers, and compute the rest again in the backward pass; ConfigError without layers."""
        checkpoint_layers(self.model, key="model.image_encoder")

    def _pool_each(self, tokens_BNF: Float[Tensor, "B N F"]) -> Float[Tensor, "B N F"]:
        """Attention pooling of every token alone: its weight is 1, whatever the query. Shape: (B, N, F) -> same."""
        head = self.model.head
        values = slice(2 * head.attention.embed_dim, None)
        weight, bias = head.attention.in_proj_weight[values], head.attention.in_proj_bias[values]
        pooled_BNF = head.attention.out_proj(F.linear(tokens_BNF, weight, bias))
        return pooled_BNF + head.mlp(head.layernorm(pooled_BNF))


def _as_patches(pixels_B3HW: Float[Tensor, "B 3 H W"], grid: tuple[int, int], patch: int) -> dict[str, Tensor]:
    """Pixels as SigLIP 2 takes them, patch by patch with their grid; channels are the fastest. Shape: -> (B, N, patch² 3)."""
    (h, w), count = grid, pixels_B3HW.shape[0]  # an export traces shapes, and not len
    cut = pixels_B3HW[:, :, : h * patch, : w * patch].unflatten(3, (w, patch)).unflatten(2, (h, patch))
    patches_BNF = cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    return {
        "pixel_values": patches_BNF,
        # Read number by number: on the CPU that waits for nothing.
        "spatial_shapes": torch.tensor([grid]).expand(count, 2),
        "pixel_attention_mask": torch.ones(count, h * w, dtype=torch.long, device=pixels_B3HW.device),
    }


def checkpoint_layers(model: nn.Module, *, key: str, optional: bool = False) -> None:
    """Have the layers of a transformers model computed again in the backward pass.

    Args:
        model: whole, or the half of one that transformers' own method of this purpose does not know.
        key: the part of the configuration that it comes from.
        optional: let a model without layers be.

    Raises:
        ConfigError: there are no layers that know how.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer  # only this needs it, and it takes a while

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
    """Names of the arguments of a model's forward, through the decorators that transformers puts around it."""
    return set(inspect.signature(inspect.unwrap(model.forward)).parameters)


def model_from_config(model_type: str, values: dict[str, Any], *, key: str) -> nn.Module:
    """A transformers model with random weights; ``key`` names the part of the configuration that it comes from.

    Raises:
        ConfigError: transformers has no such model, or ``values`` do not fit it.
    """
    if model_type not in CONFIG_MAPPING:
        ours = "neither local_conv nor" if key.endswith("image_encoder") else "not"
        raise ConfigError(f"{key}.architecture '{model_type}' is {ours} a model type of transformers")
    try:
        config = AutoConfig.for_model(model_type, **{k: v for k, v in values.items() if k != "model_type"})
        if model_type in ("siglip_text_model", "siglip2_text_model"):  # which AutoModel leaves out
            from transformers import Siglip2TextModel, SiglipTextModel

            made: Any = SiglipTextModel if model_type == "siglip_text_model" else Siglip2TextModel
            return made(config)
        return AutoModel.from_config(config)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ConfigError(f"{key}.sizes does not fit {model_type}: {' '.join(str(error).split())}") from error


def _from_checkpoint(checkpoint: str, *, head: bool) -> HuggingFaceImageEncoder:
    with checkpoint_folder(checkpoint) as folder:
        try:
            # Many are published in half precision; training wants its weights whole.
            model = AutoModel.from_pretrained(folder, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"model.image_encoder.checkpoint {checkpoint} cannot be loaded: {first_line(error)}"
            ) from error
        mean, std = read_normalisation(folder)
    return HuggingFaceImageEncoder(model, mean=mean, std=std, head=head)


@contextmanager
def checkpoint_folder(checkpoint: str) -> Iterator[str]:
    """What transformers loads: a URI as a folder that ends with the block, else the folder or hub id as it is."""
    if "://" not in checkpoint:
        yield checkpoint
        return
    with storage.local_copy(checkpoint) as folder:
        yield str(folder)


def read_normalisation(
    folder: str, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation that a folder or hub id says its pixels were normalised by; those given where it says nothing."""
    names = ("preprocessor_config.json", "processor_config.json")
    if Path(folder).is_dir() and not any((Path(folder) / name).exists() for name in names):
        return mean, std
    from transformers import AutoImageProcessor  # takes seconds to import, and only checkpoints need it

    processor = AutoImageProcessor.from_pretrained(folder)
    return tuple(processor.image_mean), tuple(processor.image_std)


def _from_factory(path: str, options: dict[str, Any]) -> nn.Module:
    module_name, separator, function = path.partition(":")
    if not separator:
        raise ConfigError(f"model.image_encoder.factory is '{path}'; write it as module:function")
    # A model folder of anybody's may name the factory: it shall reach only functions that were written to be one.
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
    """The first sentence of a library's long message."""
    return str(error).strip().split("\n")[0].rstrip(".")
