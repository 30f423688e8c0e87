"""Cleaning of captions, alt-text and hashtags."""

import doctest

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vilseg.text import cleaning
from vilseg.text.cleaning import clean_alt, clean_caption, clean_tags, is_junk


def test_the_examples_of_the_documentation() -> None:
    found = doctest.testmod(cleaning)
    assert (found.failed, found.attempted >= 4) == (0, True)


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("a dog  on\ta \n mat", "a dog on a mat"),
        ("<p>a dog</p> &quot;Rex&quot;", 'a dog "Rex"'),
        ("&amp;lt;b&amp;gt;a dog", "a dog"),
        ("a dog http://x.y/z?q=1 www.dogs.com me@x.org", "a dog"),
        ("zwei Käfer 🐞🏽 @anna.b", "zwei Käfer"),
        ("犬が公園で遊ぶ 👨‍👩‍👧", "犬が公園で遊ぶ"),
        ("one in #NewYork", "one in new york"),
        ("1 < 2 and 3 > 2", "1 < 2 and 3 > 2"),
    ],
)
def test_captions(caption: str, cleaned: str) -> None:
    assert clean_caption(caption) == cleaned


@pytest.mark.parametrize(
    ("alt", "cleaned"),
    [
        ("Photo of an image of a dog", "a dog"),
        ("photograph showing two cats", "two cats"),
        ("a picture frame", "a picture frame"),
        ("DSC00012.jpg", ""),
        ("images/red-leather-shoe_03.jpg", "red leather shoe"),
    ],
)
def test_alt_text(alt: str, cleaned: str) -> None:
    assert clean_alt(alt) == cleaned


@pytest.mark.parametrize(
    ("tags", "cleaned"),
    [
        ("#sunSet #sea @anna #SEA", "sun set, sea"),
        ("old town; sea, sea", "old town, sea"),
        (["t-shirt", "Black_And_White", "NYCSubway"], "t-shirt, black and white, nyc subway"),
        (["#2024", "4k", "😀"], ""),
        (["#猫", "#été2023"], "猫, été"),
    ],
)
def test_tags(tags: str | list[str], cleaned: str) -> None:
    assert clean_tags(tags) == cleaned


@example("0#cat")
@example("1image of 2image of a cat")
@given(st.text(max_size=60))
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    for clean in (clean_caption, clean_alt, clean_tags):
        once = clean(text)
        assert clean(once) == once


@pytest.mark.parametrize(
    "text", ["", "1234 567", "aaaaaah", "IMG_1234.JPG", "x", "d41d8cd98f00b204e9800998ecf8427e" * 2, "-- // --"]
)
def test_junk(text: str) -> None:
    assert is_junk(text)


@pytest.mark.parametrize(
    "text", ["a dog", "犬が公園で遊んでいます", "3 dogs", "собака", "été", "Donaudampfschifffahrt"]
)
def test_what_is_no_junk(text: str) -> None:
    assert not is_junk(text)
