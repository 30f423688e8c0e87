"""Captions of synthetic scenes, which resemble captions by people: correct, but not complete.

A caption names about three quarters of the object classes and of the stuff classes (background materials such as sky and grass),
with varied names and sentences, and contains words unrelated to the image. All that it states about the image is true.
"""

import random
from collections.abc import Sequence

OBJECT_PROBABILITY = 0.73
"""Probability that a caption names an object class. The actual one is slightly higher, because a caption that would be empty
names one class."""

STUFF_PROBABILITY = 0.68
"""Probability that a caption names a stuff class."""

_NAME_WEIGHTS = (0.64, 0.26, 0.10)

_SIZES = ("small", "big", "little", "large", "lovely", "nice", "pretty", "single", "lonely")

# Phrases by class. A template with "a" is for singular countable nouns, one with "the" for any noun, and one without an article
# for mass nouns and plurals ("grass", "clouds").
_PLACES: dict[str, tuple[str, ...]] = {
    "sky": ("under the {}", "under a cloudy {}", "under a wide {}", "beneath the {}", "with the {} above", "below {}"),
    "grass": ("on the {}", "on green {}", "in the {}", "on a green {}", "on fresh {}"),
    "sand": ("on the {}", "on the warm {}", "on {}", "on a quiet {}"),
    "water": ("by the {}", "near the {}", "at the {}", "with the {} behind", "next to calm {}"),
    "snow": ("in the {}", "on fresh {}", "surrounded by {}", "on the cold {}"),
    "wall": ("in front of a {}", "against the {}", "by an old {}", "near the {}"),
    "fence": ("in front of the {}", "by a wooden {}", "near the {}", "along the {}"),
}

_OPENINGS = ("", "", "", "a photo of ", "a picture of ", "photo of ", "an image of ", "a view of ", "we saw ")

_CLOSINGS = (
    " on a sunny afternoon", " in summer", ", my holiday", ", early morning", " last weekend", " - stock image",
    ", shot on film", " for sale", ", just for fun", " again", ", no filter", " (edited)", ", so peaceful",
)  # fmt: skip

_COUNTS = {2: ("two", "two", "a pair of", "some"), 3: ("three", "several", "some"), 4: ("four", "several", "many")}

_SAME_PLURAL = frozenset({"sheep"})
_MASS_NOUNS = frozenset({"grass", "sand", "water", "snow", "ice"})


def plural(noun: str) -> str:
    """Return the plural of a common English noun.

    >>> plural("daisy"), plural("bush"), plural("sheep")
    ('daisies', 'bushes', 'sheep')
    """
    if noun in _SAME_PLURAL:
        return noun
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    if noun.endswith(("s", "sh", "ch", "x")):
        return noun + "es"
    return noun + "s"


def pick_name(names: Sequence[str], rng: random.Random) -> str:
    """Draw one of the names of a class; the first is most likely."""
    return rng.choices(names, weights=_NAME_WEIGHTS[: len(names)])[0]


def object_phrase(
    names: Sequence[str], colours: Sequence[str | None], rng: random.Random, *, bare: bool = False
) -> str:
    """Return a noun phrase for all objects of one class in the image.

    Args:
        names: names of the class.
        colours: colour of each object, or None if it has several; the length is the number of objects.
        rng: random number generator.
        bare: leave out article and count, as in tags and alt-text.
    """
    name = pick_name(names, rng)
    words = []
    if colours[0] is not None and len(set(colours)) == 1 and rng.random() < 0.3:
        words = [colours[0]]
    elif rng.random() < 0.2:
        words = [rng.choice(_SIZES[:-2] if len(colours) > 1 else _SIZES)]
    words.append(plural(name) if len(colours) > 1 else name)
    if bare:
        return " ".join(words)
    if len(colours) > 1:
        return " ".join([rng.choice(_COUNTS[min(4, len(colours))]), *words])
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([rng.choice((article, article, article, "the", "one")), *words])


def _joined(phrases: Sequence[str], rng: random.Random) -> str:
    """Join noun phrases by commas, and the last by a word such as "and" or "with"."""
    if len(phrases) == 1:
        return phrases[0]
    return ", ".join(phrases[:-1]) + rng.choice((" and ", " and ", " with ", " next to ", " beside ")) + phrases[-1]


def _place(key: str, name: str, rng: random.Random) -> str:
    """Return a phrase that places objects relative to the stuff ``name``: "on the grass", "under a cloudy sky"."""

    def fits(template: str) -> bool:
        words = template.split()
        if "the" in words:
            return True
        bare = name in _MASS_NOUNS or name.endswith("s")
        return bare != bool({"a", "an"} & set(words))

    return rng.choice([template for template in _PLACES[key] if fits(template)]).format(name)


def _sentence(objects: list[str], stuff: list[tuple[str, str]], rng: random.Random) -> str:
    """Return a caption with objects and locations: "two balls on the grass under a cloudy sky"."""
    opening = rng.choice(_OPENINGS)
    if not objects:
        return opening + _joined([name if name in _MASS_NOUNS else f"the {name}" for _, name in stuff], rng)
    places = [_place(key, name, rng) for key, name in stuff]
    if places and rng.random() < 0.12:
        return f"{' '.join(places)}, {opening}{_joined(objects, rng)}"
    return opening + " ".join([_joined(objects, rng), *places])


def write_caption(
    objects: Sequence[tuple[Sequence[str], Sequence[str | None]]],
    stuff: Sequence[tuple[str, Sequence[str]]],
    rng: random.Random,
) -> tuple[str, list[bool], list[bool]]:
    """Write a caption of an image; it is never empty.

    Args:
        objects: names of each object class in the image, and the colour of each of its objects (None if it has several).
        stuff: key in the table of location phrases, and names, of each stuff class in the image.
        rng: random number generator.

    Returns:
        The caption, and for each item of ``objects`` and of ``stuff`` True if the caption names it.
    """
    said = [rng.random() < OBJECT_PROBABILITY for _ in objects] + [rng.random() < STUFF_PROBABILITY for _ in stuff]
    if not any(said):
        said[rng.randrange(len(said))] = True
    said_objects, said_stuff = said[: len(objects)], said[len(objects) :]
    as_tags = rng.random() < 0.15
    phrases = [
        object_phrase(names, colours, rng, bare=as_tags)
        for (names, colours), named in zip(objects, said_objects, strict=True)
        if named
    ]
    places = [(key, pick_name(names, rng)) for (key, names), named in zip(stuff, said_stuff, strict=True) if named]
    rng.shuffle(phrases)
    if as_tags:
        tags = phrases + [name for _, name in places]
        rng.shuffle(tags)
        return rng.choice((", ", " ", " | ")).join(tags), said_objects, said_stuff
    text = _sentence(phrases, places, rng)
    if rng.random() < 0.25:
        text += rng.choice(_CLOSINGS)
    if rng.random() < 0.4:
        text = text[0].upper() + text[1:] + rng.choice((".", "", "!"))
    return text, said_objects, said_stuff
