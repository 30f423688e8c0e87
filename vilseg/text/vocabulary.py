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
    """Class names in index order.

    A class named ``background`` stands for whatever the other names do not describe; it exists only where it is listed.

    Raises:
        DataError: no class, an empty or repeated name, or more than 65,534 classes.
    """

    classes: tuple[str, ...]

    def __post_init__(self) -> None:
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

    @property
    def background(self) -> int | None:
        """Index of the class ``background``, or None."""
        return self.classes.index(BACKGROUND) if BACKGROUND in self.classes else None

    @classmethod
    def of(cls, classes: Vocabulary | Iterable[str] | str) -> Vocabulary:
        """A vocabulary from names, the vocabulary itself, or one from text as :meth:`parse` reads it."""
        if isinstance(classes, str):
            return cls.parse(classes)
        return classes if isinstance(classes, Vocabulary) else cls(tuple(name.strip() for name in classes))

    @classmethod
    def parse(cls, spec: str) -> Vocabulary:
        """Read ``"cat,sofa"`` or the URI of a text file with one name a line (its lines may hold commas).

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
