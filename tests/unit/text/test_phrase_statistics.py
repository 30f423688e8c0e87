"""Phrases by statistics alone: an invented language whose nouns are known, and the formulas against loops."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest

from vilseg.text import phrase_statistics
from vilseg.text.noun_phrases import NounPhrases

TOPICS = {
    "farm": ["koro", "vaka", "pelu", "hono"],
    "sea": ["mira", "sulu", "tavo", "reku"],
    "town": ["bado", "nipe", "lume", "fari"],
    "sport": ["gino", "zaru", "wepo", "jula"],
}
NOUNS = {noun for topic in TOPICS.values() for noun in topic}
FUNCTION_WORDS = {"ta", "ne", "so", "ko", "ro", "di", "mu"}


def captions(count: int = 2000) -> list[str]:
    """Sentences as "Ta koro ne di vaka": articles, prepositions, and the nouns of one topic."""
    chance = random.Random(0)
    made = []
    for _ in range(count):
        nouns = chance.sample(TOPICS[chance.choice(list(TOPICS))], 3)
        if "sulu" in nouns:  # a compound of the language: sulu seldom comes alone
            nouns[nouns.index("sulu")] = "reku sulu" if chance.random() < 0.9 else "sulu"
        parts = [f"{chance.choice(['ta', 'di', 'mu'])} {noun}" for noun in nouns]
        links = [chance.choice(["ne", "so", "ko", "ro"]) for _ in range(2)]
        made.append(f"{parts[0]} {links[0]} {parts[1]} {links[1]} {parts[2]}.".capitalize())
    return made


def test_the_nouns_of_an_unknown_language_are_found_and_its_function_words_are_not() -> None:
    found = NounPhrases.from_captions(captions(), max_phrases=100, min_count=10, finder="statistics")
    singles = {phrase for phrase in found.phrases if " " not in phrase}
    assert singles >= NOUNS
    assert not singles & FUNCTION_WORDS
    assert [phrase for phrase in found.phrases if " " in phrase] == ["reku sulu"]


def test_what_is_found_is_found_again_in_captions() -> None:
    found = NounPhrases.from_captions(captions(), max_phrases=100, min_count=10, finder="statistics")
    assert {found.phrases[i] for i in found.find(["Di reku sulu so ta koro"])} == {"reku sulu", "sulu", "koro"}
    assert NounPhrases.from_json(found.to_json()) == found


def test_the_most_frequent_are_kept_and_the_rare_are_not() -> None:
    all_of_them = NounPhrases.from_captions(captions(), max_phrases=100, min_count=10, finder="statistics")
    few = NounPhrases.from_captions(captions(), max_phrases=3, min_count=10, finder="statistics")
    assert few.phrases == all_of_them.phrases[:3]
    more = [*captions(), "Ta unika ne di koro."]
    rare = NounPhrases.from_captions(more, max_phrases=100, min_count=10, finder="statistics")
    assert "unika" not in rare.phrases


@pytest.mark.parametrize("given", [[], ["", "1 2 3"], ["one word"]])
def test_next_to_no_captions_hold_no_phrase(given: list[str]) -> None:
    assert NounPhrases.from_captions(given, max_phrases=10, min_count=2, finder="statistics").phrases == ()


SMALL = [["a", "x", "b"], ["a", "y"], ["x", "a", "b", "a"], ["b", "y", "x"], ["y", "x"]]
WORDS = ["a", "b", "x", "y"]


def test_topicality_is_the_divergence_of_a_words_company() -> None:
    documents = [set(caption) for caption in SMALL]
    in_captions = Counter(word for document in documents for word in document)
    corpus = {word: in_captions[word] / in_captions.total() for word in WORDS}
    expected = []
    for word in WORDS:
        company = Counter(other for document in documents if word in document for other in document - {word})
        total = company.total()
        divergence = sum(n / total * math.log(n / total / corpus[other]) for other, n in company.items())
        expected.append(divergence - (len(company) - 1) / (2 * total))
    found = phrase_statistics._topicality([[WORDS.index(word) for word in caption] for caption in SMALL], len(WORDS))
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_diversity_is_the_entropy_of_the_word_before() -> None:
    expected = []
    for word in WORDS:
        before = Counter(p for caption in SMALL for p, w in zip(["", *caption], caption, strict=False) if w == word)
        total = before.total()
        entropy = -sum(n / total * math.log(n / total) for n in before.values())
        expected.append(entropy + (len(before) - 1) / (2 * total))
    found = phrase_statistics._left_diversity(
        [[WORDS.index(word) for word in caption] for caption in SMALL], len(WORDS)
    )
    np.testing.assert_allclose(found, expected, atol=1e-12)
