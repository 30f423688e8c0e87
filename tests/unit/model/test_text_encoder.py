"""The text tower: pooling and padding against the Hugging Face model's own, and what cannot be built."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from vilseg.config import TextEncoderConfig
from vilseg.errors import ConfigError, ModelError
from vilseg.model.text_encoder import TextEncoder, build_text_encoder
from vilseg.text.tokenizer import train_tokenizer

TEXTS = ["a dog", "two cats on a sofa by the sea", "grass"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def make_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 200)


def bert_folder(folder: Path) -> tuple[BertModel, PreTrainedTokenizerFast]:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = BertModel(BertConfig(**SIZES, vocab_size=len(tokenizer), max_position_embeddings=32)).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.mark.parametrize("pooling", ["mean", "first", "pooler"])
def test_a_checkpoint_pools_its_own_tokens(tmp_path: Path, pooling: str) -> None:
    model, tokenizer = bert_folder(tmp_path)
    config = TextEncoderConfig.model_validate({"checkpoint": str(tmp_path), "pooling": pooling, "max_tokens": 20})
    encoder = build_text_encoder(config).eval()
    with torch.no_grad():
        output = model(**tokenizer(TEXTS, padding=True, return_tensors="pt"))
        features = encoder(encoder.tokenize(TEXTS))
        trimmed = encoder(encoder.trim(encoder.tokenize(TEXTS)))
    expected = output.pooler_output if pooling == "pooler" else output.last_hidden_state[:, 0]
    if pooling == "mean":
        lengths = [len(tokenizer(text)["input_ids"]) for text in TEXTS]
        hidden = output.last_hidden_state
        expected = torch.stack([row[:length].mean(0) for row, length in zip(hidden, lengths, strict=True)])
    np.testing.assert_allclose(features, expected, atol=1e-5)
    np.testing.assert_allclose(trimmed, expected, atol=1e-5)
    assert encoder.num_features == 16


@pytest.mark.parametrize("pooling", ["mean", "pooler"])
def test_a_tokenizer_that_pads_with_its_end_token_as_clip_does(pooling: str) -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.sep_token
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", end)])
    config = CLIPTextConfig(
        **SIZES,
        vocab_size=len(tokenizer),
        max_position_embeddings=20,
        eos_token_id=end,
        pad_token_id=end,
        bos_token_id=0,
    )
    model = CLIPTextModel(config).eval()
    encoder = TextEncoder(model, tokenizer, pooling=pooling, max_tokens=20).eval()
    rows = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"])
        features = encoder(encoder.trim(encoder.tokenize(TEXTS)))
    expected = output.pooler_output
    if pooling == "mean":
        weights = rows["attention_mask"].unsqueeze(-1)
        expected = (output.last_hidden_state * weights).sum(1) / weights.sum(1)
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_padding_does_not_change_a_text() -> None:
    torch.manual_seed(0)
    encoder = build_text_encoder(TextEncoderConfig(sizes=SIZES, max_tokens=24), tokenizer=make_tokenizer()).eval()
    rows = encoder.tokenize(TEXTS)
    assert rows.shape == (3, 24)
    with torch.no_grad():
        alone = torch.cat([encoder(encoder.trim(row[None])) for row in rows])
        np.testing.assert_allclose(encoder(rows), alone, atol=1e-5)
    longest = max(len(encoder.tokenizer(text)["input_ids"]) for text in TEXTS)
    assert encoder.trim(rows).shape == (3, longest)


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_a_text_without_a_token_is_finite_and_leaves_the_others_alone(pooling: str) -> None:
    torch.manual_seed(0)
    config = TextEncoderConfig.model_validate({"sizes": SIZES, "max_tokens": 24, "pooling": pooling})
    encoder = build_text_encoder(config, tokenizer=make_tokenizer()).eval()
    with torch.no_grad():
        features = encoder(encoder.trim(encoder.tokenize(["a dog", "\u200b"])))
        alone = encoder(encoder.trim(encoder.tokenize(["a dog"])))
        nothing = encoder(encoder.trim(encoder.tokenize([""])))
    assert torch.isfinite(features).all()
    np.testing.assert_allclose(features[:1], alone, atol=1e-5)
    np.testing.assert_allclose(features[1:], nothing, atol=1e-5)


def test_rows_are_no_longer_than_the_model_takes(tmp_path: Path) -> None:
    bert_folder(tmp_path)
    encoder = build_text_encoder(TextEncoderConfig(checkpoint=str(tmp_path), max_tokens=77))
    assert encoder.tokenize(["dog " * 100]).shape == (1, 32)


@pytest.mark.parametrize(
    ("config", "kind", "words"),
    [
        ({"architecture": "brt"}, ConfigError, "model.text_encoder.architecture 'brt'"),
        ({"sizes": {**SIZES, "num_attention_heads": 3}}, ConfigError, "model.text_encoder.sizes does not fit bert"),
        ({"sizes": {"hidden_size": "many"}}, ConfigError, "model.text_encoder.sizes .*hidden_size"),
        ({"checkpoint": "./nowhere"}, ModelError, "model.text_encoder.checkpoint ./nowhere cannot be loaded"),
    ],
)
def test_what_cannot_be_built_is_told(config: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        build_text_encoder(TextEncoderConfig.model_validate(config), tokenizer=make_tokenizer())
