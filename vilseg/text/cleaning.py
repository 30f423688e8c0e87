"""Cleaning of captions, alt-text and hashtags of images, in any language.

The functions remove content that does not describe the image: markup, URLs and e-mail addresses, mentions, file names, emoji, and
the openings of alt-text ("image of"). Cleaning is idempotent. If nothing is left of a text, the result is the empty string.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable

_SPECIAL = re.compile(r"[<&#@]|://|www\.", re.IGNORECASE)
_MARKUP = re.compile(r"</?[a-zA-Z!][^<>]{0,500}>")
_ADDRESS = re.compile(r"\b(?:https?://|www\.)\S+|\S+@\S+\.\w+", re.IGNORECASE)
_MENTION = re.compile(r"(?<!\w)@\w[\w.]*")
_HASHTAG = re.compile(r"(?<!\w)[#＃](\w[\w-]*)")
_FILE_NAME = re.compile(r"(?<!\S)\S*\.(?:jpe?g|png|gif|webp|bmp|tiff?|heic|svg|avif)(?!\S)", re.IGNORECASE)
_SUFFIX = re.compile(r"\.\w+$")
_OPENING = re.compile(
    r"^(?:an?\s+|the\s+)?(?:image|photo(?:graph)?|picture|pic|illustration|screenshot|graphic)\s+"
    r"(?:of|showing|shows|depicting|containing)\s+(?=\S)",
    re.IGNORECASE,
)
_HUMPS = re.compile(r"(?<=[^\W\d_A-Z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_NUMBERS = re.compile(r"\d+")
_SPACE = re.compile(r"\s+")
_REPEATED = re.compile(r"(.)\1{4,}")
_LONGEST_WORD = 40
"""Maximum number of letters of a word; longer ones are hashes, codes, or sentences of languages without spaces."""
_LETTERS = 0.5
"""Minimum fraction of letters among the characters that are not spaces."""


def clean_caption(text: str) -> str:
    """Return a caption without markup, URLs, e-mail addresses, mentions and emoji, and with its hashtags split into words.

    >>> clean_caption("My #goldenRetriever &amp; me <b>at home</b> 😀 https://x.y/z @anna")
    'My golden retriever & me at home'
    """
    if text.isascii() and not _SPECIAL.search(text):  # fast path, used for most captions
        return " ".join(text.split())
    text = _MARKUP.sub(" ", html.unescape(html.unescape(text)))  # twice, because archives and feeds often escape twice
    text = _MENTION.sub(" ", _ADDRESS.sub(" ", text))
    text = _HASHTAG.sub(lambda found: _words_of(found[1]), text)
    return _SPACE.sub(" ", "".join(" " if _is_symbol(letter) else letter for letter in text)).strip()


def clean_alt(text: str) -> str:
    """Return alt-text cleaned like a caption, without openings like "image of", and with file names turned into words.

    File names without words are removed.

    >>> clean_alt("Image of a red-brick house")
    'a red-brick house'
    >>> clean_alt("red-shoe_02.jpg"), clean_alt("IMG_1234.JPG")
    ('red shoe', '')
    """
    text = clean_caption(_FILE_NAME.sub(lambda found: _name_as_words(found[0]), html.unescape(text)))
    while (shorter := _OPENING.sub("", text)) != text:
        text = shorter
    return text


def clean_tags(tags: str | Iterable[str]) -> str:
    """Return cleaned hashtags and keywords joined by commas, without duplicates.

    Args:
        tags: a list of tags, or a text with tags separated by commas or semicolons, or by spaces if every word begins with "#" or
            "@".

    >>> clean_tags(["#goldenRetriever", "#golden_retriever", "#cat2023", "@anna", "beach"])
    'golden retriever, cat, beach'
    """
    if isinstance(tags, str):
        words = tags.split()
        hashed = words and all(word.startswith(("#", "＃", "@")) for word in words)
        tags = words if hashed else re.split(r"[,;]", tags)
    cleaned = (_clean_tag(str(tag)) for tag in tags)
    return ", ".join(dict.fromkeys(tag for tag in cleaned if tag))


def is_junk(text: str) -> bool:
    """Return True if a cleaned text has no meaning in any language: few letters, a file name, a code, or one letter repeated."""
    solid = [letter for letter in text if not letter.isspace()]
    letters = sum(unicodedata.category(letter)[0] in "LM" for letter in solid)
    if not solid or letters < _LETTERS * len(solid) or letters < 2:
        return True
    if _REPEATED.search(text.lower()) or _FILE_NAME.fullmatch(text):
        return True
    # Long words that are not ASCII are accepted, because Chinese, Japanese and Thai sentences have no spaces.
    return any(len(word) > _LONGEST_WORD and word.isascii() for word in text.split())


def _clean_tag(tag: str) -> str:
    before = None
    while tag != before:  # repeated, because a removed number may expose a "#", an opening or an address: "0#cat"
        before = tag
        tag = tag.strip().lstrip("#＃")
        tag = "" if tag.startswith("@") else _words_of(clean_alt(tag))
    return tag


def _words_of(tag: str) -> str:
    """Split a tag into words: ``goldenRetriever``, ``golden_retriever`` and ``goldenRetriever2023`` give "golden retriever"."""
    # Hyphens are kept, because they are often part of a word: "t-shirt", "black-and-white".
    apart = _NUMBERS.sub(" ", _HUMPS.sub(" ", tag.replace("_", " "))).lower()
    return " ".join(word for word in apart.split() if len(word) > 1 or not word.isascii())


def _name_as_words(name: str) -> str:
    """Return the words in a file name; names from cameras and servers (IMG_1234, a3f9c0) have none."""
    stem = _SUFFIX.sub("", name.rsplit("/", 1)[-1])
    words = [word for word in re.split(r"[\W_\d]+", _HUMPS.sub(" ", stem)) if len(word) > 2]
    kept = [
        word.lower() for word in words if not word.isupper() and any(letter in "aeiouyäöü" for letter in word.lower())
    ]
    return " ".join(kept)


def _is_symbol(letter: str) -> bool:
    # Categories: "So" emoji and dingbats, "Sk" their modifiers, "Cn", "Co" and "Cs" unassigned, private and surrogate codes.
    # U+FE0F selects the emoji form of a character and U+200D joins emoji.
    return unicodedata.category(letter) in ("So", "Sk", "Cn", "Co", "Cs") or letter in "\ufe0f\u200d"
