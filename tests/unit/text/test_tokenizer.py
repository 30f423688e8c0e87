"""The trained tokenizer, and the light one that must cut and pad as transformers does."""

import pickle

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from vilseg.text.tokenizer import FixedTokenizer, train_tokenizer

CAPTIONS = ["a dog on the grass", "two dogs and a cat", "the cat sleeps on a sofa"]
TEXTS = ["A dog", "", "the cat and the dog and the sofa and the grass", "zebra ☃ 42"]


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerBase:
    return train_tokenizer(CAPTIONS, 200)


def fixed(tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> FixedTokenizer:
    return FixedTokenizer(tokenizer.backend_tokenizer.to_str(), max_tokens, tokenizer.pad_token_id)


@pytest.mark.parametrize("max_tokens", [4, 9, 40])
def test_it_cuts_and_pads_as_transformers_does(trained: PreTrainedTokenizerBase, max_tokens: int) -> None:
    expected = trained(TEXTS, padding="max_length", truncation=True, max_length=max_tokens)["input_ids"]
    rows = fixed(trained, max_tokens)(TEXTS)
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(rows, expected)


def test_no_texts_give_no_rows(trained: PreTrainedTokenizerBase) -> None:
    assert fixed(trained, 7)([]).shape == (0, 7)


def test_it_travels_by_pickle_before_and_after_use(trained: PreTrainedTokenizerBase) -> None:
    tokenizer = fixed(trained, 9)
    unused = pickle.loads(pickle.dumps(tokenizer))
    rows = tokenizer(TEXTS)
    used = pickle.loads(pickle.dumps(tokenizer))
    assert unused == used == tokenizer
    np.testing.assert_array_equal(unused(TEXTS), rows)
    np.testing.assert_array_equal(used(TEXTS), rows)


def test_training_is_uncased_and_knows_its_captions(trained: PreTrainedTokenizerBase) -> None:
    assert len(trained) <= 200
    assert trained("The CAT")["input_ids"] == trained("the cat")["input_ids"]
    for caption in CAPTIONS:
        assert trained.unk_token_id not in trained(caption)["input_ids"]
        assert trained.decode(trained(caption)["input_ids"], skip_special_tokens=True) == caption


def test_the_vocabulary_size_is_a_limit() -> None:
    words = [f"{a}{b}{c}" for a in "abcdef" for b in "ghijkl" for c in "mnopqr"]
    assert len(train_tokenizer([" ".join(words)], 60)) <= 60


def test_equal_captions_make_equal_tokenizers() -> None:
    # Many equally frequent pairs of letters: the order in which ties are broken shows.
    captions = [
        f"{a}{b} {b}{c} and the {a} of {c}"
        for a in ("dog", "cat", "sofa")
        for b in ("s", "ing")
        for c in ("sea", "tree")
    ]
    first, *others = (train_tokenizer(iter(captions), 50) for _ in range(4))
    assert all(other.get_vocab() == first.get_vocab() for other in others)
    assert first.pad_token_id == 0
    assert set(first.all_special_tokens) == {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    assert first.decode(first("dogs")["input_ids"], skip_special_tokens=True) == "dogs"
