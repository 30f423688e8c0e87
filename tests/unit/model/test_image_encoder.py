"""Image encoders: the local network's receptive field, Hugging Face models, and factories."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

from vilseg.config import ImageEncoderConfig
from vilseg.errors import ConfigError, ModelError
from vilseg.model.image_encoder import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    HuggingFaceImageEncoder,
    ImageFeatures,
    LocalConvEncoder,
    build_image_encoder,
)

TRANSFORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
CONVOLUTIONAL = {"hidden_sizes": [4, 8, 8, 16], "depths": [1, 1, 1, 1]}


def tiny(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "vit":
        return ViTModel(ViTConfig(**TRANSFORMER)).eval()
    if kind == "dinov2":
        return Dinov2Model(Dinov2Config(**TRANSFORMER)).eval()
    if kind == "dinov2_with_registers":
        return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**TRANSFORMER, num_register_tokens=3)).eval()
    return ConvNextModel(ConvNextConfig(**CONVOLUTIONAL)).eval()


def pictures(*size: int) -> Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))


def normalised(images: Tensor) -> Tensor:
    return (images - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)


# ------------------------------------------------------------------------------------------------------ local_conv


@pytest.mark.parametrize(("depth", "patch_size", "kernel"), [(0, 4, 3), (1, 4, 3), (2, 2, 3), (1, 8, 5)])
def test_a_pixel_reaches_only_patches_within_the_receptive_field(depth: int, patch_size: int, kernel: int) -> None:
    torch.manual_seed(0)
    encoder = LocalConvEncoder(8, depth, patch_size, kernel).eval()
    # Stride-2 convolutions of side 3 see 2 x patch - 1 pixels, and each block (kernel - 1) patches more.
    reach = (2 * patch_size - 2) / 2 + depth * (kernel - 1) * patch_size / 2
    images = pictures(96, 96)[:1]
    for row, column in ((0, 0), (47, 48), (40, 95)):
        other = images.clone()
        other[0, :, row, column] = 1 - other[0, :, row, column]
        with torch.no_grad():
            change = (encoder(other).patches - encoder(images).patches).abs().amax(2)[0].view(96 // patch_size, -1)
        changed = change.nonzero()
        assert len(changed) > 0
        # Convolutions of stride 2 with a padding of 1 are centred on the first pixel of a patch.
        centres = changed * patch_size
        distance = (centres - torch.tensor([row, column])).abs().amax()
        assert distance <= reach
        if (row, column) == (47, 48):
            assert distance > reach - patch_size, "the field is as large as its formula says"


@pytest.mark.parametrize("size", [(32, 32), (32, 48), (20, 12)])
def test_local_conv_shapes(size: tuple[int, int]) -> None:
    features = LocalConvEncoder(8, 1, 4)(pictures(*size))
    assert features.grid == (size[0] // 4, size[1] // 4)
    assert features.patches.shape == (2, features.grid[0] * features.grid[1], 8)
    assert features.pooled is None


def test_patches_run_row_by_row() -> None:
    encoder = LocalConvEncoder(8, 0, 4).eval()
    images = torch.full((1, 3, 16, 32), 0.5)
    images[0, :, 9:11, 21:23] = 1.0  # inside the patch of row 2, column 5
    with torch.no_grad():
        change = (encoder(images).patches - encoder(torch.full_like(images, 0.5)).patches).abs().sum(2)[0]
    assert int(change.argmax()) in (2 * 8 + 5, 3 * 8 + 5, 2 * 8 + 6, 3 * 8 + 6)


def test_every_image_is_independent_of_its_batch() -> None:
    torch.manual_seed(0)
    # In float64, since processors choose other float32 kernels for one image than for two, which round differently.
    encoder, images = LocalConvEncoder(8, 1, 4).eval().double(), pictures(16, 16).double()
    with torch.no_grad():
        alone = torch.cat([encoder(image[None]).patches for image in images])
        np.testing.assert_allclose(encoder(images).patches, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"patch_size": 6}, "power of two above 1, not 6"),
        ({"patch_size": 1}, "power of two above 1, not 1"),
        ({"widht": 8}, "widht"),
        ({"kernel": 4}, "kernel"),
        ({"width": 3, "patch_size": 16}, "width"),
    ],
)
def test_local_conv_sizes_that_cannot_be(sizes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_image_encoder(ImageEncoderConfig(sizes=sizes))


# ---------------------------------------------------------------------------------------------------- Hugging Face


@pytest.mark.parametrize(("kind", "prefix"), [("vit", 1), ("dinov2", 1), ("dinov2_with_registers", 4)])
@pytest.mark.parametrize("size", [(32, 32), (48, 64)])
def test_transformer_tokens_are_the_models_own(kind: str, prefix: int, size: tuple[int, int]) -> None:
    model, images = tiny(kind), pictures(*size)
    options = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    with torch.no_grad():
        tokens = model(pixel_values=normalised(images), **options).last_hidden_state
        features = HuggingFaceImageEncoder(model)(images)
    assert features.grid == (size[0] // 8, size[1] // 8)
    assert features.patches.shape == (2, features.grid[0] * features.grid[1], 16)
    np.testing.assert_array_equal(features.patches, tokens[:, prefix:])
    assert features.pooled is not None
    np.testing.assert_array_equal(features.pooled, tokens[:, 0])


def test_a_feature_map_becomes_patches() -> None:
    model, images = tiny("convnext"), pictures(64, 96)
    with torch.no_grad():
        expected = model(pixel_values=normalised(images)).last_hidden_state
        features = HuggingFaceImageEncoder(model)(images)
    assert features.grid == (2, 3)
    assert features.pooled is None
    np.testing.assert_array_equal(features.patches.transpose(1, 2).unflatten(2, (2, 3)), expected)


@pytest.mark.parametrize("kind", ["vit", "dinov2", "convnext"])
def test_a_checkpoint_folder_gives_its_weights_and_its_normalisation(tmp_path: Path, kind: str) -> None:
    model, images = tiny(kind), pictures(64, 64)
    model.save_pretrained(tmp_path)
    encoder = build_image_encoder(ImageEncoderConfig(checkpoint=str(tmp_path))).eval()
    with torch.no_grad():
        np.testing.assert_array_equal(encoder(images).patches, HuggingFaceImageEncoder(model)(images).patches)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ViTImageProcessor", "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.1, 0.3]}'
    )
    other = build_image_encoder(ImageEncoderConfig(checkpoint=str(tmp_path)))
    assert other.mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])
    assert other.std.flatten().tolist() == pytest.approx([0.2, 0.1, 0.3])


@pytest.mark.parametrize(
    ("architecture", "sizes"), [("vit", TRANSFORMER), ("dinov2", TRANSFORMER), ("convnext", CONVOLUTIONAL)]
)
def test_an_architecture_from_scratch_is_rebuilt_from_its_saved_configuration(
    architecture: str, sizes: dict[str, Any]
) -> None:
    encoder = build_image_encoder(ImageEncoderConfig(architecture=architecture, sizes=sizes)).eval()
    again = build_image_encoder(ImageEncoderConfig(architecture=architecture), hf_config=encoder.hf_config).eval()
    again.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        np.testing.assert_array_equal(encoder(pictures(64, 32)).patches, again(pictures(64, 32)).patches)


def test_of_clip_the_image_half_is_taken() -> None:
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=TRANSFORMER)).eval()
    encoder = HuggingFaceImageEncoder(clip)
    assert not any("text" in name for name, _ in encoder.named_parameters())
    assert encoder(pictures(48, 32)).patches.shape == (2, 24, 16)
    rebuilt = HuggingFaceImageEncoder(AutoModel.from_config(type(clip.config.vision_config)(**TRANSFORMER)))
    rebuilt.load_state_dict(encoder.state_dict())


@pytest.mark.parametrize(
    ("config", "kind", "words"),
    [
        ({"architecture": "vti"}, ConfigError, "model.image_encoder.architecture 'vti'"),
        ({"architecture": "vit", "sizes": {"hidden_size": "many"}}, ConfigError, "sizes"),
        ({"checkpoint": "./nowhere"}, ModelError, "./nowhere cannot be loaded"),
    ],
)
def test_what_cannot_be_built_is_told(config: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        build_image_encoder(ImageEncoderConfig.model_validate(config))


# -------------------------------------------------------------------------------------------------------- factories


class Blocks(nn.Module):
    """Example of a user's own encoder."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.num_features = 3 * side**2
        self.side = side

    def forward(self, images_B3HW: Tensor) -> ImageFeatures:
        grid = (images_B3HW.shape[2] // self.side, images_B3HW.shape[3] // self.side)
        patches = nn.functional.unfold(images_B3HW, self.side, stride=self.side).transpose(1, 2)
        return ImageFeatures(patches, None, grid)


def no_encoder() -> nn.Module:
    return nn.Identity()


def test_a_factory_by_import_path() -> None:
    config = ImageEncoderConfig(factory=f"{__name__}:Blocks", factory_options={"side": 4})
    encoder = build_image_encoder(config)
    assert isinstance(encoder, Blocks)
    assert encoder(pictures(16, 8)).patches.shape == (2, 8, 48)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("module.function", "module:function"),
        ("no_such_module_anywhere:f", "cannot be imported.*no_such_module_anywhere"),
        (f"{__name__}:missing", "cannot be imported.*missing"),
        ("os:system", "os is a module of Python itself"),
        ("importlib.util:find_spec", "importlib.util is a module of Python itself"),
        (f"{__name__}:Dinov2Model", f"not defined in {__name__}.*transformers"),
        (f"{__name__}:CONVOLUTIONAL", f"not defined in {__name__}"),
        (f"{__name__}:no_encoder", "must return a torch module with 'num_features'"),
    ],
)
def test_factories_that_are_none_are_told(path: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_image_encoder(ImageEncoderConfig(factory=path))


def test_factory_options_that_do_not_fit_are_told() -> None:
    with pytest.raises(ConfigError, match=r"factory_options does not fit .*Blocks.*side"):
        build_image_encoder(ImageEncoderConfig(factory=f"{__name__}:Blocks", factory_options={"depth": 4}))
