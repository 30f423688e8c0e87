"""Phrases found by corpus statistics alone, for languages without a tagger or a word list.

The aim is to find words that name things in images. A word must pass three criteria, and words are joined by a fourth:

- *Frequency*: a word must occur in enough captions to be learnt, and in at most half of them, because a more frequent word does
  not discriminate.
- *Topicality*: the words that occur in captions together with it must be distributed differently from the whole corpus, by the
  Kullback-Leibler divergence, corrected for its bias with few samples (Miller 1955). Function words, and attributes that anything
  can have (colours), occur with everything (Lo et al. 2005, "Automatically building a stopword list", find stop words in this
  way).
- *Contextual diversity*: the entropy of the word directly before it must not be in the top quarter. Names of things follow few
  words (articles, numbers, attributes), while prepositions, conjunctions and many verbs follow any word.
- *Compounds*: two or three consecutive words that pass are joined if their normalised pointwise mutual information is high (Bouma
  2009).

Verbs and adjectives that belong to a topic ("surfing", "snowy") pass as well, and singular and plural are two phrases. On 10,000
English captions of Flickr8k, judged by a tagger and counting every occurrence, 69 % of the chosen words are nouns (33 % of all
words are) and 79 % of the nouns are chosen. The noun "man" is not chosen, because it occurs with everything. The thresholds were
set on this corpus and were not tested on another language. In captions without topics, such as those of the synthetic scenes,
nouns are lost and attributes are kept. In languages without spaces between words (Chinese, Thai), whole clauses count as words
and the result is useless.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

_MAX_FRACTION = 0.5
"""Maximum fraction of the captions that contain a word."""
_TOPICALITY = 0.2
"""Minimum Kullback-Leibler divergence, in nats, between the words that occur in captions with a word and all words of the corpus.
Half the median divergence of the words replaces it if that is lower."""
_DIVERSITY_QUANTILE = 0.75
"""Quantile of contextual diversity above which words are left out."""
_COHESION = 0.5
"""Minimum normalised pointwise mutual information of neighbouring words in a compound; 1 for words that only occur together."""
_MAX_WORDS = 3


def count_phrases(captions: Sequence[Sequence[str]], min_count: int) -> Counter[str]:
    """Return the phrases (words and compounds that pass the criteria), with the number of captions that contain each phrase.

    Args:
        captions: captions, each as a list of words.
        min_count: minimum number of captions that contain a phrase.
    """
    in_captions = Counter(word for caption in captions for word in set(caption))
    frequent = [word for word, count in in_captions.items() if count >= min_count]
    if not frequent:
        return Counter()
    index = {word: number for number, word in enumerate(frequent)}
    # The last index stands for all rare words, and for the start of a caption.
    numbered = [[index.get(word, len(frequent)) for word in caption] for caption in captions]
    diversity = _left_diversity(numbered, len(frequent))
    topicality = _topicality(numbered, len(frequent))
    # If hardly any word is topical (random captions from few words), the threshold is half of the median.
    topical = topicality >= min(_TOPICALITY, np.median(topicality) / 2)
    named = topical & (diversity <= np.quantile(diversity, _DIVERSITY_QUANTILE))
    names = {word for word, good in zip(frequent, named, strict=True) if good}
    names = {word for word in names if in_captions[word] <= _MAX_FRACTION * len(captions)}
    compounds = _compounds(captions, names, min_count)
    return Counter({word: in_captions[word] for word in names}) + compounds


def _topicality(captions: list[list[int]], words: int) -> np.ndarray:
    """Return each word's divergence, in nats, between the words that occur with it and the corpus. Shape: -> (words,)."""
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
    """Return the compounds of two or three words out of ``names``, with the number of captions that contain each compound."""
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
