"""Pictures that the page offers to begin with."""

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
_MOST = 12


@dataclass(frozen=True)
class Example:
    """A picture and what to look for in it."""

    name: str
    image: bytes
    classes: tuple[str, ...]


def load_examples(uri: str | None) -> list[Example]:
    """The pictures of a folder with ``classes.txt`` in it, or synthetic scenes where there is no folder.

    Raises:
        ConfigError: the folder has no picture, or no class list.
        StorageError: it cannot be read.
    """
    if uri is None:
        return [_scene(number) for number in _SCENES]
    files = [entry for entry in storage.list_files(uri) if entry.relative.lower().endswith(_SUFFIXES)][:_MOST]
    names = storage.join(uri, "classes.txt")
    if not files or not storage.exists(names):
        raise ConfigError(f"the examples at {uri} need pictures and a class list named classes.txt")
    classes = Vocabulary.parse(names).entries
    return [Example(Path(entry.relative).name, storage.read_bytes(entry.uri), classes) for entry in files]


def _scene(number: int) -> Example:
    scene = scenes.render_scene(0, number, _SIDE, split="eval")
    [pair] = scenes.pairs(1, 0, _SIDE, start=number, split="eval")
    present = sorted({*scene.stuff, *(item.class_id for item in scene.objects)})
    listed = ["|".join(scenes.CLASSES[index].names[:2]) for index in present]
    return Example(f"scene-{number}.jpg", pair.image, tuple(listed))
