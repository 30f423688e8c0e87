"""Example images of the page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vilseg import storage
from vilseg.data.synthetic import scenes
from vilseg.errors import ConfigError
from vilseg.text.vocabulary import Vocabulary

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_SCENES = (1, 4, 9)
_SIDE = 256
_MAX_EXAMPLES = 12


@dataclass(frozen=True)
class Example:
    """Example image with its class list."""

    name: str
    """File name."""
    image: bytes
    """Encoded image."""
    classes: tuple[str, ...]
    """Class names, with synonyms as ``sofa|couch``."""


def load_examples(uri: str | None) -> list[Example]:
    """Load the example images of the page.

    Args:
        uri: URI of a directory with up to 12 images and ``classes.txt``, the class list of all of them. None returns three
            synthetic scenes.

    Raises:
        ConfigError: The directory has no image or no ``classes.txt``.
        StorageError: The directory cannot be read.
    """
    if uri is None:
        return [_scene(number) for number in _SCENES]
    files = [entry for entry in storage.list_files(uri) if entry.relative.lower().endswith(_SUFFIXES)][:_MAX_EXAMPLES]
    names = storage.join(uri, "classes.txt")
    if not files or not storage.exists(names):
        raise ConfigError(f"the examples at {uri} need images and a class list named classes.txt")
    classes = Vocabulary.parse(names).entries
    return [Example(Path(entry.relative).name, storage.read_bytes(entry.uri), classes) for entry in files]


def _scene(number: int) -> Example:
    scene = scenes.render_scene(0, number, _SIDE, split="eval")
    [pair] = scenes.pairs(1, 0, _SIDE, start=number, split="eval")
    present = sorted({*scene.stuff, *(item.class_id for item in scene.objects)})
    listed = ["|".join(scenes.CLASSES[index].names[:2]) for index in present]
    return Example(f"scene-{number}.jpg", pair.image, tuple(listed))
