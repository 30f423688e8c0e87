"""Tiny checkpoints of Hugging Face's own classes, in folders as their users save them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2Model,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTModel,
)

from vilseg.text.tokenizer import train_tokenizer

SIDE, PATCH = 32, 8
MEAN = {"clip": [0.48, 0.46, 0.41], "siglip": [0.5, 0.5, 0.5], "siglip2": [0.5, 0.5, 0.5]}
STD = {"clip": [0.27, 0.26, 0.28], "siglip": [0.5, 0.5, 0.5], "siglip2": [0.5, 0.5, 0.5]}
CONTRASTIVE = ("clip", "siglip", "siglip2")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_VISION = {**_SIZES, "hidden_size": 16, "image_size": SIDE, "patch_size": PATCH}
_TEXT = {**_SIZES, "hidden_size": 24, "max_position_embeddings": 20}


def contrastive(kind: str, folder: Path) -> PreTrainedModel:
    """A CLIP, SigLIP or SigLIP 2 with tokenizer and preprocessing; returns the model that was saved."""
    torch.manual_seed(0)
    tokenizer = {"clip": _clip_tokenizer, "siglip": _siglip_tokenizer, "siglip2": _siglip2_tokenizer}[kind]()
    tokens = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id or 0,
    }
    model: PreTrainedModel
    if kind == "clip":
        text, vision = {**_TEXT, **tokens, "projection_dim": 12}, {**_VISION, "projection_dim": 12}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    elif kind == "siglip":
        text = {**_TEXT, **tokens, "projection_size": 16}
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=_VISION))
    else:
        text = {**_TEXT, **tokens, "projection_size": 16}
        vision = {name: value for name, value in _VISION.items() if name != "image_size"}
        model = Siglip2Model(Siglip2Config(text_config=text, vision_config={**vision, "num_patches": 16}))
    _randomise(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if kind == "siglip":  # as Google's folders name it
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "SiglipTokenizer"}))
    (folder / "preprocessor_config.json").write_text(json.dumps(_preprocessing(kind)))
    return model.eval()


def vision(kind: str, folder: Path) -> PreTrainedModel:
    """A vision model alone."""
    torch.manual_seed(0)
    model: PreTrainedModel
    if kind == "vit":
        model = ViTModel(ViTConfig(**_VISION))
    elif kind == "dinov2":
        model = Dinov2Model(Dinov2Config(**_VISION))
    else:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**_VISION, num_register_tokens=3))
    _randomise(model)
    model.save_pretrained(folder)
    return model.eval()


def bert(folder: Path) -> PreTrainedModel:
    """A text model with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a dog", "two cats on a sofa by the sea", "grass"], 200)
    model = BertModel(BertConfig(**_TEXT, vocab_size=len(tokenizer)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Norms and biases as well, that none can be left out unseen."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)


def _preprocessing(kind: str) -> dict[str, Any]:
    names = {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor", "siglip2": "Siglip2ImageProcessor"}
    square = {"height": SIDE, "width": SIDE}
    sizes: dict[str, Any] = {"size": square}
    if kind == "clip":
        sizes = {"size": {"shortest_edge": SIDE}, "crop_size": square, "do_center_crop": True}
    elif kind == "siglip2":
        sizes = {"patch_size": PATCH, "max_num_patches": (SIDE // PATCH) ** 2}
    return {
        "image_processor_type": names[kind],
        **sizes,
        "resample": 3,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN[kind],
        "image_std": STD[kind],
    }


def _clip_tokenizer() -> PreTrainedTokenizerFast:
    merges = [("d", "o"), ("do", "g</w>"), ("c", "a"), ("ca", "t</w>")]
    pieces = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), *("".join(merge) for merge in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=merges)


def _siglip_tokenizer() -> PreTrainedTokenizerFast:
    words = ["</s>", "<unk>", "a", "dog", "two", "cats", "on", "sofa", "grass", "the", "sea"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids"],
    )


def _siglip2_tokenizer() -> PreTrainedTokenizerFast:
    merges = [("d", "o"), ("do", "g"), ("c", "a"), ("ca", "t")]
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *_LETTERS, *("".join(merge) for merge in merges)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return Siglip2Tokenizer(vocab=vocabulary, merges=merges, padding_side="right")
