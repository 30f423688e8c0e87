"""Phrases of a corpus by its statistics alone, for languages without a tagger or a list of words.

The aim is to find words that name things in images. The statistics used are:

- *frequency band*: a word must be in enough captions to be learnt, and in at most half of them, or it parts nothing;
- *topicality*: the words beside which a word occurs in captions differ from those of the whole corpus, by the Kullback-Leibler
  divergence with its bias for few samples taken off (Miller 1955); function words, and attributes that anything can have
  (colours), go with everything (stop words by divergence: Lo et al. 2005, "Automatically building a stopword list");
- *contextual diversity*: entropy of the word directly before; names of things follow few (articles, numbers, attributes),
  while prepositions, conjunctions and many verbs follow anything. The quarter of the words with the most is left out;
- *compounds*: two or three such words in a row that keep together, by normalised pointwise mutual information (Bouma 2009).

So verbs and adjectives that belong to a topic ("surfing", "snowy") are found too, and singular and plural are two phrases. On
10,000 captions of Flickr8k (English, where a tagger can be asked) 69 % of the words chosen are nouns, of all words 33 %, each
counted as often as it occurs, and 79 % of the nouns are chosen; "man", beside whom anything occurs, is not. The thresholds were
set there and tried on no other language. Captions without topics, as those of the synthetic scenes, lose nouns and keep
attributes. Languages that do not part words by spaces (Chinese, Thai) give whole clauses for words, and nothing useful.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

_MAX_FRACTION = 0.5
"""Largest fraction of the captions that may hold a word."""
_TOPICALITY = 0.2
"""Nats by which the words beside a word must differ from the corpus."""
_DIVERSITY_QUANTILE = 0.75
"""Words with a more diverse left neighbourhood than this fraction of all are left out."""
_COHESION = 0.5
"""Normalised pointwise mutual information of a compound's neighbours, 1 for words that never part."""
_MAX_WORDS = 3


def count_phrases(captions: Sequence[Sequence[str]], min_count: int) -> Counter[str]:
    """Count the captions that hold each word or compound that is taken for the name of a thing.

    Args:
        captions: each a list of words.
        min_count: number of captions that must hold a phrase.
    """
    in_captions = Counter(word for caption in captions for word in set(caption))
    frequent = [word for word, count in in_captions.items() if count >= min_count]
    if not frequent:
        return Counter()
    index = {word: number for number, word in enumerate(frequent)}
    # One number more stands for every rare word and for the beginning of a caption.
    numbered = [[index.get(word, len(frequent)) for word in caption] for caption in captions]
    diversity = _left_diversity(numbered, len(frequent))
    topicality = _topicality(numbered, len(frequent))
    # If hardly a word is topical (captions made from few words at random), half of the median is the threshold.
    topical = topicality >= min(_TOPICALITY, np.median(topicality) / 2)
    named = topical & (diversity <= np.quantile(diversity, _DIVERSITY_QUANTILE))
    names = {word for word, good in zip(frequent, named, strict=True) if good}
    names = {word for word in names if in_captions[word] <= _MAX_FRACTION * len(captions)}
    compounds = _compounds(captions, names, min_count)
    return Counter({word: in_captions[word] for word in names}) + compounds


def _topicality(captions: list[list[int]], words: int) -> np.ndarray:
    """Return the divergence of the words beside each word from the corpus, in nats. Shape: -> (words,)."""
    together = np.zeros((words, words))
    for caption in captions:
        present = np.array(sorted({word for word in caption if word < words}), dtype=int)
        together[np.ix_(present, present)] += 1
    in_captions = together.diagonal().copy()
    np.fill_diagonal(together, 0)
    of_corpus = in_captions / in_captions.sum()
    company = together.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        fractions = together / company[:, None]
        divergence = np.where(together > 0, fractions * np.log(fractions / of_corpus), 0.0).sum(1)
        bias = ((together > 0).sum(1) - 1) / (2 * company)
    return np.where(company > 0, divergence - bias, 0.0)


def _left_diversity(captions: list[list[int]], words: int) -> np.ndarray:
    """Return the entropy of the word directly before each word, in nats. Shape: -> (words,)."""
    before = np.zeros((words + 1, words + 1))
    for caption in captions:
        np.add.at(before, (caption, [words, *caption[:-1]]), 1)
    before = before[:words]
    total = before.sum(1)
    fractions = before / total[:, None]
    entropy = -np.where(before > 0, fractions * np.log(np.maximum(fractions, 1e-300)), 0.0).sum(1)
    return entropy + ((before > 0).sum(1) - 1) / (2 * total)


def _compounds(captions: Sequence[Sequence[str]], names: set[str], min_count: int) -> Counter[str]:
    """Count the captions that hold each run of two or three names of which every two neighbours keep together."""
    words: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    for caption in captions:
        words.update(caption)
        pairs.update(pairwise(caption))
    total, total_pairs = words.total(), pairs.total()
    cohesive = set()
    for (first, second), count in pairs.items():
        if count >= min_count and first != second and {first, second} <= names:
            joint = count / total_pairs
            information = np.log(joint * total**2 / (words[first] * words[second]))
            if information >= -_COHESION * np.log(joint):
                cohesive.add((first, second))
    found: Counter[str] = Counter()
    for caption in captions:
        runs: set[str] = set()
        for length in range(2, _MAX_WORDS + 1):
            for start in range(len(caption) - length + 1):
                run = caption[start : start + length]
                if all(pair in cohesive for pair in pairwise(run)):
                    runs.add(" ".join(run))
        found.update(runs)
    return Counter({run: count for run, count in found.items() if count >= min_count})
