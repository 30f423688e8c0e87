"""Noun phrases of captions: collected from a corpus, then found in every caption.

A part-of-speech tagger (HanTa, Wartena 2019) reads a sample of the captions once. The result is a small table from surface forms
("dogs", "traffic lights") to phrases ("dog", "traffic light"), which is applied to every caption without the tagger, fast enough
for reading. For other languages statistics of the captions replace the tagger, see ``vilseg.text.phrase_statistics``; then every
form is its own phrase.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from vilseg.text.phrase_statistics import count_phrases

_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
_MAX_WORDS = 3
_MIN_NOUN_FRACTION = 0.5
"""A form counts as a noun if the tagger says so in at least this fraction of its occurrences ("runs" mostly is not)."""


@dataclass(frozen=True)
class NounPhrases:
    """Noun phrases of a corpus, most frequent first, with the surface forms that stand for them.

    Example:
        >>> phrases = NounPhrases(("dog", "traffic light"), {"dog": 0, "dogs": 0, "traffic light": 1})
        >>> phrases.find(["Two dogs at a traffic light"])
        [0, 1]
    """

    phrases: tuple[str, ...] = ()
    forms: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_captions(
        cls,
        captions: Sequence[str],
        *,
        max_phrases: int,
        min_count: int,
        finder: Literal["tagger", "statistics"] = "tagger",
    ) -> NounPhrases:
        """Collect nouns and compounds of up to three nouns that ``min_count`` captions hold, at most ``max_phrases``.

        ``finder`` is the way in which nouns are recognized; see ``NounsConfig.finder``.
        """
        if finder == "statistics":
            found_in = count_phrases([words(caption) for caption in captions], min_count)
            phrases = _most_frequent(found_in, min_count)[:max_phrases]
            return cls(phrases, {phrase: number for number, phrase in enumerate(phrases)})
        from HanTa.HanoverTagger import HanoverTagger  # loads its model; only this needs it

        tagger = HanoverTagger("morphmodel_en.pgz")
        as_noun: Counter[str] = Counter()
        occurrences: Counter[str] = Counter()
        lemmas: dict[str, Counter[str]] = {}
        for caption in captions:
            tagged = tagger.tag_sent(words(caption))
            occurrences.update(form for form, _, _ in tagged)
            found: set[str] = set()
            run: list[tuple[str, str]] = []
            for form, lemma, tag in [*tagged, ("", "", "")]:
                if tag.startswith("NN"):
                    run.append((form, lemma))
                    continue
                for surface, phrase in _runs(run):
                    found.add(surface)
                    lemmas.setdefault(surface, Counter())[phrase] += 1
                run = []
            as_noun.update(found)
        chosen = {surface: forms.most_common(1)[0][0] for surface, forms in lemmas.items()}
        counts: Counter[str] = Counter()
        for surface, phrase in chosen.items():
            if " " in surface or as_noun[surface] >= _MIN_NOUN_FRACTION * occurrences[surface]:
                counts[phrase] += as_noun[surface]
        index = {phrase: i for i, phrase in enumerate(_most_frequent(counts, min_count)[:max_phrases])}
        forms = {surface: index[phrase] for surface, phrase in chosen.items() if phrase in index}
        return cls(tuple(index), forms)

    def find(self, captions: Iterable[str]) -> list[int]:
        """Return the indices of the phrases that any of the captions holds, ascending.

        The head of a compound counts too, its other parts do not: "tennis ball" is a ball, not a tennis.
        """
        found: set[int] = set()
        for caption in captions:
            tokens = words(caption)
            covered = len(tokens)  # everything from here on belongs to a compound found
            for end in range(len(tokens), 0, -1):
                # Most words end no phrase, and this check runs for every word of every caption.
                if end > covered or tokens[end - 1] not in self._last_words:
                    continue
                heads = [
                    self.forms.get(" ".join(tokens[start:end])) for start in range(max(0, end - self._longest), end)
                ]
                longest = next((i for i, phrase in enumerate(heads) if phrase is not None), None)
                if longest is None:
                    continue
                found.update(phrase for phrase in heads if phrase is not None)
                covered = end - (len(heads) - longest)
        return sorted(found)

    @cached_property
    def _last_words(self) -> frozenset[str]:
        return frozenset(form.rpartition(" ")[2] for form in self.forms)

    @cached_property
    def _longest(self) -> int:
        return max((form.count(" ") + 1 for form in self.forms), default=0)

    def to_json(self) -> str:
        """Return the table as text that :meth:`from_json` reads."""
        return json.dumps({"phrases": self.phrases, "forms": self.forms}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> NounPhrases:
        """Read the table that :meth:`to_json` wrote."""
        tree = json.loads(text)
        return cls(tuple(tree["phrases"]), tree["forms"])


def words(caption: str) -> list[str]:
    """Return the lower-case words of a caption, without digits and punctuation."""
    return _WORD.findall(caption.lower())


def _most_frequent(counts: Counter[str], min_count: int) -> tuple[str, ...]:
    return tuple(p for p, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if n >= min_count)


def _runs(run: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return every noun of a run of nouns and every compound that ends in one: (surface form, phrase with its head's lemma)."""
    found = []
    for end in range(len(run)):
        for start in range(max(0, end - _MAX_WORDS + 1), end + 1):
            forms = [form for form, _ in run[start : end + 1]]
            found.append((" ".join(forms), " ".join([*forms[:-1], run[end][1].lower()])))
    return found
