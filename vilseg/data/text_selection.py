"""Selection of a pair's text (caption, alt-text or hashtags), which is cleaned, filtered and drawn at random for each epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vilseg.config.data import FiltersConfig, TextConfig
from vilseg.text.cleaning import clean_alt, clean_caption, clean_tags, is_junk

KINDS = ("caption", "alt", "tags")


@dataclass(frozen=True)
class TextSelector:
    """Selector that cleans and filters the texts of a pair and computes the probability of drawing each text in an epoch.

    Args:
        weights: relative probability of each kind of text.
        filters: filters, of which those for texts are applied.

    Example:
        >>> TextSelector().probabilities({"caption": ["A dog", "Two   dogs"]})
        {'A dog': 0.5, 'Two dogs': 0.5}
    """

    weights: TextConfig = field(default_factory=TextConfig)
    filters: FiltersConfig = field(default_factory=FiltersConfig)

    def probabilities(self, texts: Mapping[str, Sequence[str]]) -> dict[str, float]:
        """Return the usable texts, cleaned, with their probabilities, which sum to 1; empty if no text is usable.

        Args:
            texts: stored texts by kind (`KINDS`).
        """
        found = {kind: self._cleaned(kind, texts.get(kind, ())) for kind in KINDS}
        weights = {kind: getattr(self.weights, kind) for kind in KINDS if found[kind]}
        if not any(weights.values()):
            weights = dict.fromkeys(list(weights)[:1], 1.0)
        total = sum(weights.values())
        probabilities: dict[str, float] = {}
        for kind, weight in weights.items():
            for text in found[kind] if weight else ():
                probabilities[text] = probabilities.get(text, 0) + weight / total / len(found[kind])
        return probabilities

    def _cleaned(self, kind: str, texts: Sequence[str]) -> list[str]:
        if kind == "tags":
            cleaned = [clean_tags(texts[0] if len(texts) == 1 else texts)]
        else:
            cleaned = [(clean_alt if kind == "alt" else clean_caption)(text) for text in texts]
        return [text for text in dict.fromkeys(cleaned) if text and self._is_wanted(text)]

    def _is_wanted(self, text: str) -> bool:
        filters = self.filters
        words = text.count(" ") + 1  # cleaned texts have one space between words
        if words < filters.min_words or (filters.max_words is not None and words > filters.max_words):
            return False
        if len(text) < filters.min_characters or (
            filters.max_characters is not None and len(text) > filters.max_characters
        ):
            return False
        return not (filters.junk and is_junk(text))


def choose_text(probabilities: Sequence[float], seed: int) -> int:
    """Draw the index of a text with ``probabilities``; the draw depends only on ``seed``."""
    point = (seed >> 8 & 0xFFFFFFFF) / 2**32
    for index, probability in enumerate(probabilities):
        point -= probability
        if point < 0:
            return index
    return len(probabilities) - 1  # reached if the sum is less than 1 by rounding
