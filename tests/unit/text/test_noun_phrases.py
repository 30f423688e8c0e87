"""Noun phrases: collected from captions by a tagger, then found in captions by table alone."""

import pytest

from vilseg.text.noun_phrases import NounPhrases, words

CAPTIONS = [
    "Two dogs play with a tennis ball on the grass.",
    "A dog sleeps near the traffic lights.",
    "The traffic light is red, and a dog runs.",
    "Dogs run over the grass to a tennis ball.",
    "A woman holds a tennis ball.",
]


@pytest.fixture(scope="module")
def nouns() -> NounPhrases:
    return NounPhrases.from_captions(CAPTIONS, max_phrases=100, min_count=2)


def found(nouns: NounPhrases, *captions: str) -> set[str]:
    return {nouns.phrases[i] for i in nouns.find(captions)}


def test_plurals_and_singulars_are_one_phrase(nouns: NounPhrases) -> None:
    assert nouns.phrases[0] == "dog", "the most frequent phrase comes first"
    assert "dogs" not in nouns.phrases
    assert found(nouns, "Dogs everywhere") == {"dog"}
    assert found(nouns, "TRAFFIC LIGHTS at night") == {"traffic light", "light"}


def test_rare_phrases_are_left_out(nouns: NounPhrases) -> None:
    assert "woman" not in nouns.phrases
    assert found(nouns, "a woman") == set()


def test_max_phrases_keeps_the_most_frequent() -> None:
    few = NounPhrases.from_captions(CAPTIONS, max_phrases=1, min_count=1)
    assert few.phrases == ("dog",)
    assert set(few.forms.values()) == {0}


def test_no_phrases_from_no_captions() -> None:
    none = NounPhrases.from_captions([], max_phrases=10, min_count=1)
    assert none.phrases == ()
    assert none.find(["a dog"]) == []


def test_of_a_compound_the_head_counts_and_its_other_parts_do_not() -> None:
    names = ("ball", "tennis", "tennis ball", "court", "tennis court")
    table = NounPhrases(names, {name: i for i, name in enumerate(names)})
    assert found(table, "a tennis ball") == {"tennis ball", "ball"}
    assert found(table, "tennis is played with a ball") == {"tennis", "ball"}
    assert found(table, "a tennis ball tennis court") == {"tennis ball", "ball", "tennis court", "court"}


def test_captions_of_a_pair_are_joined_and_indices_ascend() -> None:
    table = NounPhrases(("cat", "dog"), {"cat": 0, "cats": 0, "dog": 1})
    assert table.find(["a dog", "cats and a dog"]) == [0, 1]
    assert table.find([]) == []


def test_verbs_are_not_nouns(nouns: NounPhrases) -> None:
    assert not {"run", "play", "sleep"} & set(nouns.phrases)


def test_the_table_survives_json(nouns: NounPhrases) -> None:
    again = NounPhrases.from_json(nouns.to_json())
    assert again == nouns
    assert again.find(CAPTIONS) == nouns.find(CAPTIONS)


def test_words() -> None:
    assert words("A well-known cat's 3 TOYS, über-nice!") == ["a", "well-known", "cat's", "toys", "über-nice"]
