"""Noun phrases, which are collected from a sample of captions and then found in every caption.

A part-of-speech tagger (HanTa, Wartena 2019) processes the sample once. The result is a table from surface forms ("dogs",
"traffic lights") to phrases ("dog", "traffic light"). Looking up captions in the table needs no tagger and is fast enough to be
done while batches are read. For languages other than English, statistics of the captions replace the tagger, and every surface
form is a separate phrase; see ``vilseg.text.phrase_statistics``.
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
"""Minimum fraction of a form's occurrences that the tagger must label as a noun ("runs" mostly is a verb)."""


@dataclass(frozen=True)
class NounPhrases:
    """Noun phrases of a corpus, the most frequent first, with the index of the phrase for each surface form.

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
        """Collect the most frequent nouns, and compounds of up to three nouns, of a sample of captions.

        Args:
            captions: sample of captions.
            max_phrases: maximum number of phrases.
            min_count: minimum number of captions that contain a phrase.
            finder: method of recognizing nouns; see ``NounsConfig.finder``.
        """
        if finder == "statistics":
            found_in = count_phrases([words(caption) for caption in captions], min_count)
            phrases = _most_frequent(found_in, min_count)[:max_phrases]
            return cls(phrases, {phrase: number for number, phrase in enumerate(phrases)})
        from HanTa.HanoverTagger import HanoverTagger  # here, because the import loads a model and is seldom needed

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
        """Return the indices, ascending, of the phrases that occur in any of the captions.

        The head of a compound counts as an occurrence, its other words do not: "tennis ball" contains "ball", but not "tennis".
        """
        found: set[int] = set()
        for caption in captions:
            tokens = words(caption)
            covered = len(tokens)  # tokens from this position on belong to a compound already found
            for end in range(len(tokens), 0, -1):
                # A fast check, because it runs for every word of every caption and most words end no phrase.
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
        """Return the phrases and forms as JSON, for :meth:`from_json`."""
        return json.dumps({"phrases": self.phrases, "forms": self.forms}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> NounPhrases:
        """Create noun phrases from the JSON that :meth:`to_json` returned."""
        tree = json.loads(text)
        return cls(tuple(tree["phrases"]), tree["forms"])


def words(caption: str) -> list[str]:
    """Return the lower-case words of a caption, without digits and punctuation."""
    return _WORD.findall(caption.lower())


def _most_frequent(counts: Counter[str], min_count: int) -> tuple[str, ...]:
    return tuple(p for p, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if n >= min_count)


def _runs(run: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return (surface form, phrase with the lemma of its head) of each noun and compound in consecutive nouns (form, lemma)."""
    found = []
    for end in range(len(run)):
        for start in range(max(0, end - _MAX_WORDS + 1), end + 1):
            forms = [form for form, _ in run[start : end + 1]]
            found.append((" ".join(forms), " ".join([*forms[:-1], run[end][1].lower()])))
    return found
