"""Class lists from names, from text, and from files; one sentence for whatever is wrong."""

from pathlib import Path

import pytest

from vilseg.errors import DataError
from vilseg.text.vocabulary import MAX_CLASSES, Vocabulary


def test_names_keep_their_order_and_lose_their_margins() -> None:
    assert Vocabulary.of([" cat", "traffic light ", "sofa"]).classes == ("cat", "traffic light", "sofa")
    vocabulary = Vocabulary(("a", "b"))
    assert Vocabulary.of(vocabulary) is vocabulary


def test_text_is_split_at_commas() -> None:
    assert Vocabulary.parse("cat, sofa,,traffic light,").classes == ("cat", "sofa", "traffic light")
    assert Vocabulary.of("cat,sofa").classes == ("cat", "sofa"), "a string is not a sequence of letters"


def test_a_file_has_one_name_a_line_and_may_hold_commas(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufeffbackground\r\nwall, concrete\r\n\r\nGürtel\r\n".encode())
    assert Vocabulary.parse(str(path)).classes == ("background", "wall, concrete", "Gürtel")


def test_a_long_list_is_not_taken_for_a_path() -> None:
    names = [f"class number {i}" for i in range(400)]
    assert Vocabulary.parse(",".join(names)).classes == tuple(names)


@pytest.mark.parametrize(("names", "index"), [(("background", "cat"), 0), (("cat", "background"), 1), (("cat",), None)])
def test_background_is_there_only_where_it_is_listed(names: tuple[str, ...], index: int | None) -> None:
    assert Vocabulary(names).background == index


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "the class list is empty"),
        (["cat", "  "], "class 1 .* empty name"),
        (["cat", "dog", "Cat"], "'Cat' is listed twice, at 0 and 2"),
        ([str(i) for i in range(MAX_CLASSES + 1)], "65,535 names"),
    ],
)
def test_bad_lists_are_told(names: list[str], words: str) -> None:
    with pytest.raises(DataError, match=words):
        Vocabulary.of(names)


def test_the_largest_list_is_fine() -> None:
    assert len(Vocabulary.of(map(str, range(MAX_CLASSES))).classes) == 65_534


@pytest.mark.parametrize("spec", ["", " ", ",,"])
def test_text_without_a_name_is_told(spec: str) -> None:
    with pytest.raises(DataError, match="empty"):
        Vocabulary.parse(spec)


def test_files_that_are_none_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        Vocabulary.parse(f"{tmp_path}/missing.txt")
    with pytest.raises(DataError, match="does not exist"):
        Vocabulary.parse("missing.txt")
    with pytest.raises(DataError, match="is a folder"):
        Vocabulary.parse(str(tmp_path))
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(DataError, match="the class list is empty"):
        Vocabulary.parse(str(tmp_path / "empty.txt"))


def test_synonyms_follow_the_name() -> None:
    vocabulary = Vocabulary.parse("sofa | couch|settee, cat")
    assert vocabulary.classes == ("sofa", "cat")
    assert vocabulary.names(0) == ("sofa", "couch", "settee")
    assert vocabulary.names(1) == ("cat",)
    assert vocabulary.entries == ("sofa|couch|settee", "cat")
    assert Vocabulary.of(vocabulary.entries) == vocabulary
    assert Vocabulary.parse("sofa,cat").synonyms == ()


def test_background_can_be_added_and_be_made_of_words() -> None:
    plain = Vocabulary.parse("sofa|couch,cat")
    added = plain.with_background(["wall", "floor"])
    assert added.classes == ("sofa", "cat", "background")
    assert added.background_words == ("wall", "floor")
    assert added.names(0) == plain.names(0)
    listed = Vocabulary.parse("background,cat")
    assert listed.with_background().classes == ("background", "cat")


@pytest.mark.parametrize(
    ("spec", "words"),
    [("sofa|,cat", "empty synonym"), ("sofa|cat,cat", "cannot stand for"), ("a|x,b|X", "cannot stand for")],
)
def test_wrong_synonyms(spec: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Vocabulary.parse(spec)
