"""Tokenizers, trained on captions or loaded, and a lightweight function from texts to token ids for both."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from vilseg.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def train_tokenizer(captions: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerBase:
    """Train an uncased WordPiece tokenizer (Devlin et al. 2019, section 3) with at most ``vocabulary_size`` pieces.

    The tokenizer adds no class and separator tokens to a text, because the text encoder pools a text by the mean of its tokens,
    and two tokens common to all texts would make the initial embeddings of single nouns nearly equal.
    """
    from transformers import PreTrainedTokenizerFast  # here, because the import is slow and often not needed

    normalizer, pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    captions = list(captions)
    inner = set[str]()
    for caption in captions:
        for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(caption)):
            inner.update(word[1:])
    # The trainer numbers letters inside words in the order of a hash table, which differs between runs, and breaks ties by these
    # numbers. Letters passed as special tokens have a fixed order, so that equal captions give equal tokenizers.
    known = [*_SPECIAL.values(), *(f"##{letter}" for letter in sorted(inner))]
    training = Tokenizer(models.WordPiece(unk_token=_SPECIAL["unk_token"]))
    training.normalizer, training.pre_tokenizer = normalizer, pre_tokenizer
    training.train_from_iterator(
        captions, trainers.WordPieceTrainer(vocab_size=vocabulary_size, special_tokens=known, show_progress=False)
    )
    tokenizer = Tokenizer(models.WordPiece(training.get_vocab(), unk_token=_SPECIAL["unk_token"]))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, pre_tokenizer, decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_SPECIAL)


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face model folder or hub id.

    Raises:
        ModelError: the loaded tokenizer is not one of the ``tokenizers`` library and cannot be converted to one.
        OSError, ValueError, ImportError: transformers cannot load it.
    """
    from transformers import AutoTokenizer

    settings = Path(folder) / "tokenizer_config.json"
    if settings.exists():
        values = json.loads(settings.read_text(encoding="utf-8"))
        if values.get("tokenizer_class") in ("SiglipTokenizer", "SiglipTokenizerFast"):
            return _siglip_tokenizer(Path(folder), values)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ModelError(
            f"the tokenizer at {folder}, {type(tokenizer).__name__}, has no fast form; save it as tokenizer.json there"
        )
    return tokenizer


def _siglip_tokenizer(folder: Path, settings: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Load SigLIP's tokenizer from ``tokenizer.json``, because the class in transformers needs the sentencepiece library.

    As in that class, texts are lower-cased and punctuation is removed (``canonicalize_text`` in SigLIP's big_vision code).
    """
    from transformers import PreTrainedTokenizerFast

    file = folder / "tokenizer.json"
    if not file.exists():
        raise ModelError(
            f"the tokenizer at {folder} is a sentencepiece model alone; save it as tokenizer.json there, "
            "as transformers.convert_slow_tokenizer makes it"
        )
    backend = Tokenizer.from_file(str(file))
    steps: list[Any] = [normalizers.Lowercase()] if settings.get("do_lower_case", True) else []
    steps += [
        normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
    ]
    backend.normalizer = normalizers.Sequence([*steps, *([backend.normalizer] if backend.normalizer else [])])
    named = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    for name, usual in named.items():
        token = settings.get(name, usual)
        named[name] = token["content"] if isinstance(token, dict) else token
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=["input_ids"], **named)


@dataclass(frozen=True)
class FixedTokenizer:
    """Function from texts to token ids of a fixed length, which needs neither torch nor transformers and is pickled as text.

    Example:
        >>> tokenizer = Tokenizer(models.WordLevel({"dog": 1, "[PAD]": 0, "[UNK]": 2}, unk_token="[UNK]"))
        >>> tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> FixedTokenizer(tokenizer.to_str(), max_tokens=3, pad_id=0)(["dog", "dog dog dog dog"])
        array([[1, 0, 0],
               [1, 1, 1]], dtype=int32)
    """

    serialized: str
    """Tokenizer of the ``tokenizers`` library, serialized as JSON."""
    max_tokens: int
    """Number of tokens of every row of the result."""
    pad_id: int
    """Token id that fills the rows of shorter texts."""

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Return the token ids, truncated and padded. Shape: B texts -> (B, max_tokens), int32."""
        encoded = self._tokenizer.encode_batch(list(texts))
        return np.array([encoding.ids for encoding in encoded], dtype=np.int32).reshape(len(texts), self.max_tokens)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_str(self.serialized)
        tokenizer.enable_truncation(self.max_tokens)
        tokenizer.enable_padding(pad_id=self.pad_id, length=self.max_tokens)
        return tokenizer

    def __getstate__(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("serialized", "max_tokens", "pad_id")}
