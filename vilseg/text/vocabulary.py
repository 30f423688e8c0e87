"""The class names that a segmentation chooses from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vilseg import storage
from vilseg.errors import DataError

BACKGROUND = "background"
MAX_CLASSES = 65_534
"""A 16-bit mask leaves 65535 for "no class"; one more is kept free for formats that count from 1."""


@dataclass(frozen=True)
class Vocabulary:
    """Class names in index order, each with the synonyms that stand for it.

    A class named ``background`` stands for whatever the other names do not describe; it exists only where it is listed.

    Raises:
        DataError: no class, an empty or repeated name, or more than 65,534 classes.
    """

    classes: tuple[str, ...]
    """What results call the classes."""
    synonyms: tuple[tuple[str, ...], ...] = ()
    """Of every class, other names for it: a picture's score for a class is that of the name that fits best. Empty where
    no class has any."""
    background_words: tuple[str, ...] = ()
    """What the class ``background`` is made of; the model's own words where empty."""

    def __post_init__(self) -> None:
        if self.synonyms and len(self.synonyms) != len(self.classes):
            raise DataError(f"there are synonyms of {len(self.synonyms)} classes, but {len(self.classes)} classes")
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

    def names(self, index: int) -> tuple[str, ...]:
        """The name of a class and its synonyms."""
        return (self.classes[index], *(self.synonyms[index] if self.synonyms else ()))

    @property
    def entries(self) -> tuple[str, ...]:
        """The classes as :meth:`of` reads them, synonyms included."""
        return tuple("|".join(self.names(index)) for index in range(len(self.classes)))

    def with_background(self, words: Iterable[str] = ()) -> Vocabulary:
        """The same with the class ``background``, last where it was not listed, made of ``words``."""
        listed = self.background is not None
        return Vocabulary(
            self.classes if listed else (*self.classes, BACKGROUND),
            self.synonyms if listed or not self.synonyms else (*self.synonyms, ()),
            tuple(words),
        )

    @property
    def background(self) -> int | None:
        """Index of the class ``background``, or None."""
        return self.classes.index(BACKGROUND) if BACKGROUND in self.classes else None

    @classmethod
    def of(cls, classes: Vocabulary | Iterable[str] | str) -> Vocabulary:
        """A vocabulary from names (``sofa`` or, with synonyms, ``sofa|couch``), itself, or text for :meth:`parse`."""
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
        """Read ``"cat,sofa|couch"`` or the URI of a text file with one class a line (its lines may hold commas).

        Synonyms follow the name of a class after ``|``.

        Raises:
            DataError: not a class list; see the class for what is checked.
            StorageError: the file cannot be read.
        """
        # No file name is longer than 255 bytes, but a list of names soon is.
        may_be_file = bool(spec.strip()) and max(map(len, spec.encode().split(b"/"))) <= 255
        if may_be_file and storage.exists(spec):
            if storage.is_folder(spec):
                raise DataError(
                    f"{spec} is a folder; give a text file with one class name a line, or names as 'cat,sofa'"
                )
            return cls.of(line for line in storage.read_text(spec).splitlines() if line.strip())
        if (may_be_file and "/" in spec) or spec.endswith((".txt", ".yaml", ".yml")):
            raise DataError(
                f"the class list {spec} does not exist; give a text file with one name a line, or names as 'cat,sofa'"
            )
        return cls.of(name for name in spec.split(",") if name.strip())
