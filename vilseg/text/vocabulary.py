"""Vocabulary: the class names that a segmentation chooses from, with synonyms, prompts and background words."""

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
"""A 16-bit mask leaves 65535 for "no class"; one more is kept free for formats that count from 1."""
_YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class Vocabulary:
    """Class names in index order, each with the synonyms that stand for it.

    A class named ``background`` stands for whatever the other names do not describe; it exists only where it is listed.

    Raises:
        DataError: no class, an empty or repeated name, more than 65,534 classes, or a negative word that is a class.

    Example:
        >>> vocabulary = Vocabulary.of("cat,sofa|couch").with_background()
        >>> vocabulary.classes, vocabulary.names(1)
        (('cat', 'sofa', 'background'), ('sofa', 'couch'))
    """

    classes: tuple[str, ...]
    """Names of the classes in results."""
    synonyms: tuple[tuple[str, ...], ...] = ()
    """Other names of every class; ``SegmentationConfig.synonyms`` decides how their scores are combined. Empty where no class
    has any."""
    background_words: tuple[str, ...] = ()
    """Words that stand for the class ``background``; the model's own where empty."""
    negatives: tuple[str, ...] = ()
    """Names that compete for pixels without being classes: a pixel that fits one of them best is ``background``, or no class
    where there is no such class."""
    prompts: tuple[str, ...] = ()
    """Templates for all names; the model's own where empty."""
    class_prompts: tuple[tuple[str, ...], ...] = ()
    """Templates for the names of every class that replace ``prompts``. Empty where no class has any."""

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
        """Return the name of a class and its synonyms."""
        return (self.classes[index], *(self.synonyms[index] if self.synonyms else ()))

    @property
    def entries(self) -> tuple[str, ...]:
        """The classes as :meth:`of` reads them, with synonyms."""
        return tuple("|".join(self.names(index)) for index in range(len(self.classes)))

    def with_background(self, words: Iterable[str] = ()) -> Vocabulary:
        """Return the vocabulary with the class ``background``, last where it was not listed, with ``words``."""
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
        """Twelve hexadecimal digits that name the vocabulary: SHA-256 over all of its parts and their order.

        Two results can be compared only where these are equal.
        """
        parts: dict[str, object] = {
            "classes": [self.names(index) for index in range(len(self.classes))],
            "background_words": self.background_words,
            "negatives": self.negatives,
            "prompts": self.prompts,
            "class_prompts": self.class_prompts if any(self.class_prompts) else (),
        }
        # Empty parts are left out, so that a part added later does not change the digests of today.
        text = json.dumps({key: value for key, value in parts.items() if value}, ensure_ascii=True, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @classmethod
    def of(cls, classes: Vocabulary | Iterable[str] | str) -> Vocabulary:
        """Make a vocabulary from names (``sofa``, or ``sofa|couch`` with synonyms), text for :meth:`parse`, or a vocabulary."""
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
        """Read ``"cat,sofa|couch"``, the URI of a file, or the name of a built-in vocabulary.

        A text file has one class a line (its lines may hold commas), a file that ends in ``.yaml`` or ``.yml`` is as
        :mod:`vilseg.text.vocabulary_yaml` says. ``voc``, ``context``, ``coco``, ``coco-panoptic``, ``coco-stuff`` and
        ``ade20k`` come with the package; a file of that name goes before. Synonyms follow the name of a class after ``|``.

        Raises:
            DataError: not a class list; see the class for what is checked.
            StorageError: the file cannot be read.
        """
        # No file name is longer than 255 bytes, but a list of names soon is.
        may_be_file = bool(spec.strip()) and max(map(len, spec.encode().split(b"/"))) <= 255
        there = may_be_file and storage.exists(spec)
        folder = there and storage.is_folder(spec)
        if there and not folder:
            text = storage.read_text(spec)
            if spec.endswith(_YAML):
                return cls._from_yaml(text, spec)
            return cls.of(line for line in text.splitlines() if line.strip())
        if spec in built_in():  # a folder of that name holds the data set
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
        """Return a vocabulary that comes with the package, in the order of its class ids, with synonyms."""
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
