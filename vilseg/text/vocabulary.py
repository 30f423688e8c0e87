"""Vocabularies, which are the class names of a segmentation with their synonyms, prompts and background words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from vilseg import storage
from vilseg.errors import DataError
from vilseg.text.vocabulary_yaml import built_in, read_yaml

BACKGROUND = "background"
MAX_CLASSES = 65_534
"""Maximum number of classes. In a 16-bit mask, the value 65535 means "no class", and one more value is reserved for formats that
count from 1."""
_YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class Vocabulary:
    """Class names in the order of their indices, each with its synonyms.

    A class named ``background`` stands for everything that the other names do not describe; it exists only if it is listed.

    Raises:
        DataError: there is no class, a name is empty or repeated, there are more than 65,534 classes, or a negative word is also
            a class name or synonym.

    Example:
        >>> vocabulary = Vocabulary.of("cat,sofa|couch").with_background()
        >>> vocabulary.classes, vocabulary.names(1)
        (('cat', 'sofa', 'background'), ('sofa', 'couch'))
    """

    classes: tuple[str, ...]
    """Names of the classes, as they appear in results."""
    synonyms: tuple[tuple[str, ...], ...] = ()
    """Synonyms of each class, in the order of ``classes``; empty if no class has synonyms. ``SegmentationConfig.synonyms`` sets
    how the scores of a class's names are combined."""
    background_words: tuple[str, ...] = ()
    """Words whose best score is the score of the class ``background``; if empty, ``SegmentationConfig.background_words`` of the
    model replaces them."""
    negatives: tuple[str, ...] = ()
    """Negative words, which compete with the classes: a pixel whose best score is that of a negative word gets the class
    ``background``, or no class if there is no such class."""
    prompts: tuple[str, ...] = ()
    """Prompt templates of all classes; if empty, ``SegmentationConfig.prompts`` of the model replaces them."""
    class_prompts: tuple[tuple[str, ...], ...] = ()
    """Prompt templates of each class, which replace ``prompts`` for this class; empty if no class has any."""

    def __post_init__(self) -> None:
        for what, lists in (("synonyms", self.synonyms), ("prompts", self.class_prompts)):
            if lists and len(lists) != len(self.classes):
                raise DataError(f"there are {what} of {len(lists)} classes, but {len(self.classes)} classes")
        if not self.classes:
            raise DataError("the class list is empty; give at least one class name")
        if len(self.classes) > MAX_CLASSES:
            raise DataError(
                f"the class list has {len(self.classes):,} names; a 16-bit mask holds at most {MAX_CLASSES:,}"
            )
        seen: dict[str, int] = {}
        for index, name in enumerate(self.classes):
            if not name.strip():
                raise DataError(f"class {index} (counted from 0) has an empty name")
            folded = name.casefold()
            if folded in seen:
                raise DataError(
                    f"the class name '{name}' is listed twice, at {seen[folded]} and {index} (counted from 0)"
                )
            seen[folded] = index
        for index, others in enumerate(self.synonyms):
            for name in others:
                owner = seen.setdefault(name.casefold(), index)
                if owner != index:
                    raise DataError(
                        f"'{name}' cannot stand for '{self.classes[index]}' and for '{self.classes[owner]}'"
                    )
        for word in self.negatives:
            if (owner := seen.get(word.casefold(), -1)) >= 0:
                raise DataError(
                    f"the negative word '{word}' stands for the class '{self.classes[owner]}'; leave it out, since a class "
                    "wins its pixels anyway"
                )

    def names(self, index: int) -> tuple[str, ...]:
        """Return the name and the synonyms of the class ``index``."""
        return (self.classes[index], *(self.synonyms[index] if self.synonyms else ()))

    @property
    def entries(self) -> tuple[str, ...]:
        """Classes in the form ``name|synonym|...``, which :meth:`of` accepts."""
        return tuple("|".join(self.names(index)) for index in range(len(self.classes)))

    def with_background(self, words: Iterable[str] = ()) -> Vocabulary:
        """Return a copy with ``words`` instead of its background words; append the class ``background`` if it is missing."""
        if self.background is not None:
            return replace(self, background_words=tuple(words))
        return replace(
            self,
            classes=(*self.classes, BACKGROUND),
            synonyms=(*self.synonyms, ()) if self.synonyms else (),
            class_prompts=(*self.class_prompts, ()) if self.class_prompts else (),
            background_words=tuple(words),
        )

    @property
    def background(self) -> int | None:
        """Index of the class ``background``, or None."""
        return self.classes.index(BACKGROUND) if BACKGROUND in self.classes else None

    @cached_property
    def digest(self) -> str:
        """Identifier of the vocabulary: the first 12 hexadecimal digits of the SHA-256 hash over all fields and the class order.

        Two results are comparable only if their digests are equal.
        """
        parts: dict[str, object] = {
            "classes": [self.names(index) for index in range(len(self.classes))],
            "background_words": self.background_words,
            "negatives": self.negatives,
            "prompts": self.prompts,
            "class_prompts": self.class_prompts if any(self.class_prompts) else (),
        }
        # Empty fields are left out, so that a field added in a later version does not change the digests of today.
        text = json.dumps({key: value for key, value in parts.items() if value}, ensure_ascii=True, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @classmethod
    def of(cls, classes: Vocabulary | Iterable[str] | str) -> Vocabulary:
        """Create a vocabulary from names (``sofa``, or ``sofa|couch`` with a synonym), or a text for :meth:`parse`.

        A vocabulary is returned unchanged.
        """
        if isinstance(classes, str):
            return cls.parse(classes)
        if isinstance(classes, Vocabulary):
            return classes
        names = [[part.strip() for part in entry.split("|")] for entry in classes]
        for first, *others in names:
            if not all(others):
                raise DataError(f"the class '{first}' has an empty synonym; write {first}|other name")
        synonyms = tuple(tuple(others) for _, *others in names)
        return cls(tuple(first for first, *_ in names), synonyms if any(synonyms) else ())

    @classmethod
    def parse(cls, spec: str) -> Vocabulary:
        """Create a vocabulary from names (``"cat,sofa|couch"``), the URI of a file, or the name of a built-in vocabulary.

        A text file has one class per line, and names may contain commas. A file with the suffix ``.yaml`` or ``.yml`` has the
        format of :mod:`vilseg.text.vocabulary_yaml`. The built-in vocabularies are ``voc``, ``context``, ``coco``,
        ``coco-panoptic``, ``coco-stuff`` and ``ade20k``; a file of the same name takes precedence. Synonyms follow the class name
        after ``|``.

        Raises:
            DataError: ``spec`` is not a valid class list; see the class for the checks.
            StorageError: the file cannot be read.
        """
        # A list of names is often longer than 255 bytes, the limit for a file name.
        may_be_file = bool(spec.strip()) and max(map(len, spec.encode().split(b"/"))) <= 255
        there = may_be_file and storage.exists(spec)
        folder = there and storage.is_folder(spec)
        if there and not folder:
            text = storage.read_text(spec)
            if spec.endswith(_YAML):
                return cls._from_yaml(text, spec)
            return cls.of(line for line in text.splitlines() if line.strip())
        if spec in built_in():  # even if there is a folder of that name, which is probably the dataset
            return cls.built_in(spec)
        if folder:
            raise DataError(
                f"{spec} is a folder; give a text or YAML file with one class name a line, or names as 'cat,sofa'"
            )
        if (may_be_file and "/" in spec) or spec.endswith((".txt", *_YAML)):
            raise DataError(
                f"the class list {spec} does not exist; give a text or YAML file with one name a line, names as 'cat,sofa', "
                f"or one of {', '.join(built_in())}"
            )
        return cls.of(name for name in spec.split(",") if name.strip())

    @classmethod
    def built_in(cls, name: str) -> Vocabulary:
        """Return the built-in vocabulary ``name``, with synonyms, in the order of the dataset's class ids."""
        return cls._from_yaml(built_in()[name].read_text(encoding="utf-8"), name)

    @classmethod
    def _from_yaml(cls, text: str, place: str) -> Vocabulary:
        parts = read_yaml(text, place)
        words = parts.pop("background")
        try:
            vocabulary = cls(**parts)
            return vocabulary if words is None else vocabulary.with_background(words)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
