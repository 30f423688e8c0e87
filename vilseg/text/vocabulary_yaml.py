"""YAML files of vocabularies, both the user's and the built-in ones.

    classes:
      - cat
      - {name: sofa, synonyms: [couch], prompts: ["a photo of a {}"], negatives: [armchair]}
    background: [wall, sky]
    negatives: [watermark]
    prompts: short

Only ``classes`` is required. Any other list may be replaced by a single value. ``prompts`` may be the name of a set in
:mod:`vilseg.text.prompt_templates`. ``background: true`` adds the class ``background`` without background words.
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from vilseg.errors import DataError
from vilseg.text.prompt_templates import resolve_templates

_BUILT_IN = Path(__file__).parent / "vocabularies"
_KEYS = ("classes", "background", "negatives", "prompts")
_CLASS_KEYS = ("name", "synonyms", "prompts", "negatives")


@cache
def built_in() -> dict[str, Path]:
    """Return the paths of the built-in vocabularies' YAML files by vocabulary name.

    The names are ``ade20k``, ``coco``, ``coco-panoptic``, ``coco-stuff``, ``context`` and ``voc``.
    """
    return {path.stem: path for path in sorted(_BUILT_IN.glob("*.yaml"))}


def read_yaml(text: str, place: str) -> dict[str, Any]:
    """Read a YAML file as the keyword arguments of :class:`~vilseg.text.vocabulary.Vocabulary`, without ``background_words``.

    The result has the additional key ``background``: the tuple of background words if the file adds the class ``background``
    with its key of the same name, otherwise None.

    Args:
        text: content of the file.
        place: name of the file for error messages.

    Raises:
        DataError: the content is not valid; the message names the file, the key and the value.
    """
    try:
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise DataError(f"{place} is not valid YAML: {' '.join(str(error).split())}") from error
    if isinstance(tree, list):
        raise DataError(f"{place} holds a list; write it below the key 'classes:'")
    if not isinstance(tree, dict) or "classes" not in tree:
        raise DataError(f"{place} has no key 'classes'; write 'classes:' and below it one '- name' a line")
    _check_keys(tree, _KEYS, place, "")
    if not isinstance(tree["classes"], list):
        raise _wrong(place, "classes", tree["classes"], "give a list of names, one '- name' a line")
    entries = [_entry(item, place, f"classes[{index}]") for index, item in enumerate(tree["classes"])]
    negatives = [*_names(tree.get("negatives", []), place, "negatives"), *(word for e in entries for word in e[3])]
    background = tree.get("background")
    return {
        "classes": tuple(entry[0] for entry in entries),
        "synonyms": _or_none([entry[1] for entry in entries]),
        "prompts": _prompts(tree, place, ""),
        "class_prompts": _or_none([entry[2] for entry in entries]),
        "negatives": tuple(dict.fromkeys(negatives)),
        "background": None if background in (None, False) else _background(background, place),
    }


def _entry(item: Any, place: str, key: str) -> tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return the name, synonyms, prompts and negative words of one class."""
    if not isinstance(item, dict):
        name, *synonyms = (part.strip() for part in _name(item, place, key).split("|"))
        if not all(synonyms):
            raise _wrong(place, key, item, "it has an empty synonym")
        return name, tuple(synonyms), (), ()
    _check_keys(item, _CLASS_KEYS, place, f"{key}.")
    if "name" not in item:
        raise _wrong(place, key, item, "a class needs a 'name'")
    return (
        _name(item["name"], place, f"{key}.name"),
        _names(item.get("synonyms", []), place, f"{key}.synonyms"),
        _prompts(item, place, f"{key}."),
        _names(item.get("negatives", []), place, f"{key}.negatives"),
    )


def _background(value: Any, place: str) -> tuple[str, ...]:
    return () if value is True else _names(value, place, "background")


def _prompts(tree: dict[str, Any], place: str, prefix: str) -> tuple[str, ...]:
    value = tree.get("prompts")
    if value is None:
        return ()
    key = f"{prefix}prompts"
    if not isinstance(value, str):
        value = _names(value, place, key)
    try:
        return resolve_templates(value)
    except ValueError as error:
        raise DataError(f"{place}: {key}: {error}") from error


def _names(value: Any, place: str, key: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        return (_name(value, place, key),)
    return tuple(_name(item, place, f"{key}[{index}]") for index, item in enumerate(value))


def _name(value: Any, place: str, key: str) -> str:
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, (bool, int, float)):
        raise _wrong(place, key, value, "YAML reads this as no text; put it between quotes")
    raise _wrong(place, key, value, "give a name")


def _check_keys(tree: dict[Any, Any], known: tuple[str, ...], place: str, prefix: str) -> None:
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}"
            raise DataError(f"{place}: unknown key '{prefix}{key}'; {hint}")


def _wrong(place: str, key: str, value: Any, remedy: str) -> DataError:
    return DataError(f"{place}: {key} is {value!r}: {remedy}")


def _or_none(lists: list[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """Return ``lists`` as a tuple; the empty tuple if every list is empty."""
    return tuple(lists) if any(lists) else ()


class _Loader(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys, of which PyYAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key in self._keys(node):
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' is given twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def _keys(self, node: yaml.MappingNode) -> Iterator[Any]:
        return (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
