"""Vocabularies as YAML: the content of a file, one sentence for every mistake in it, and the files of the package."""

from collections.abc import Callable
from pathlib import Path

import pytest

from vilseg.errors import DataError
from vilseg.text.prompt_templates import resolve_templates
from vilseg.text.vocabulary import Vocabulary

FILE = """
classes:
  - cat
  - {name: sofa, synonyms: [couch, settee], prompts: ["a photo of a {}", "the {}"], negatives: [armchair]}
  - sky|clouds
background: [wall, floor]
negatives: watermark
prompts: short
"""


@pytest.fixture
def parse(tmp_path: Path) -> Callable[[str], Vocabulary]:
    def parse(text: str) -> Vocabulary:
        (tmp_path / "list.yaml").write_text(text)
        return Vocabulary.parse(f"{tmp_path}/list.yaml")

    return parse


def test_everything_a_file_can_say(parse: Callable[[str], Vocabulary]) -> None:
    vocabulary = parse(FILE)
    assert vocabulary.classes == ("cat", "sofa", "sky", "background")
    assert vocabulary.synonyms == ((), ("couch", "settee"), ("clouds",), ())
    assert vocabulary.background_words == ("wall", "floor")
    assert vocabulary.negatives == ("watermark", "armchair")
    assert vocabulary.prompts == resolve_templates("short")
    assert vocabulary.class_prompts == ((), ("a photo of a {}", "the {}"), (), ())
    assert vocabulary.entries == ("cat", "sofa|couch|settee", "sky|clouds", "background")


def test_a_plain_list_of_classes_is_that_of_a_text_file(parse: Callable[[str], Vocabulary]) -> None:
    assert parse("classes: [cat, sofa|couch]") == Vocabulary.of("cat,sofa|couch")


@pytest.mark.parametrize("value", ["true", "[]"])
def test_background_without_words_of_its_own(parse: Callable[[str], Vocabulary], value: str) -> None:
    assert parse(f"classes: [cat]\nbackground: {value}") == Vocabulary(("cat", "background"))
    assert parse(f"classes: [background, cat]\nbackground: {value}").background == 0


@pytest.mark.parametrize("value", ["false", "null"])
def test_no_background(parse: Callable[[str], Vocabulary], value: str) -> None:
    assert parse(f"classes: [cat]\nbackground: {value}") == Vocabulary(("cat",))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- cat\n- dog", r"list\.yaml holds a list; write it below the key 'classes:'"),
        ("", r"list\.yaml has no key 'classes'"),
        ("names: [cat]", r"list\.yaml has no key 'classes'"),
        ("classes: cat", r"list\.yaml: classes is 'cat': give a list"),
        ("classes: []", r"list\.yaml: the class list is empty"),
        ("classes: [cat, Cat]", r"list\.yaml: the class name 'Cat' is listed twice, at 0 and 1"),
        ("classes: [cat, no]", r"list\.yaml: classes\[1\] is False: .* between quotes"),
        ("classes: [747]", r"classes\[0\] is 747: .* between quotes"),
        ("classes: [cat, null]", r"classes\[1\] is None: give a name"),
        ("classes: [cat, 'sofa|']", r"classes\[1\] is 'sofa\|': it has an empty synonym"),
        ("classes: [{synonyms: [couch]}]", r"classes\[0\] is .* a class needs a 'name'"),
        ("classes: [{name: sofa, synonym: couch}]", r"unknown key 'classes\[0\]\.synonym'; did you mean 'synonyms'"),
        ("classes: [{name: sofa, synonyms: [a, 1]}]", r"classes\[0\]\.synonyms\[1\] is 1: "),
        ("classes: [{name: sofa, prompts: [a photo]}]", r"classes\[0\]\.prompts: the prompt 'a photo' must hold"),
        (
            "classes: [cat]\nprompts: clib",
            r"list\.yaml: prompts: there is no set of prompts 'clib'; did you mean 'clip'",
        ),
        ("classes: [cat]\nnegative: [dog]", r"unknown key 'negative'; did you mean 'negatives'"),
        ("classes: [cat]\nbackground: [{wall: 1}]", r"background\[0\] is \{'wall': 1\}: give a name"),
        ("classes: [cat, a|tom]\nnegatives: [Tom]", r"negative word 'Tom' stands for the class 'a'; leave it out"),
        ("classes: [cat]\nclasses: [dog]", r"list\.yaml is not valid YAML: the key 'classes' is given twice"),
        ("classes: [cat", r"list\.yaml is not valid YAML"),
    ],
)
def test_mistakes_are_told(parse: Callable[[str], Vocabulary], text: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        parse(text)
    assert "\n" not in str(caught.value)
    assert "list.yaml" in str(caught.value)


def test_a_missing_file_is_told() -> None:
    with pytest.raises(DataError, match=r"missing\.yml does not exist"):
        Vocabulary.parse("missing.yml")


def test_the_digest_knows_every_part_and_the_order(parse: Callable[[str], Vocabulary]) -> None:
    digests = [
        Vocabulary.of(classes).digest for classes in ("cat,sofa", "sofa,cat", "cat|sofa", "cat,sofa|couch", "cat,Sofa")
    ]
    plain = Vocabulary.of("cat,sofa")
    digests += [plain.with_background().digest, plain.with_background(["wall"]).digest]
    digests += [parse(f"classes: [cat, sofa]\n{more}").digest for more in ("prompts: clip", "negatives: [dog]")]
    digests.append(parse("classes: [cat, {name: sofa, prompts: 'the {}'}]").digest)
    assert len(set(digests)) == len(digests)
    assert all(len(digest) == 12 and set(digest) <= set("0123456789abcdef") for digest in digests)
    assert plain.digest == parse("classes: [cat, sofa]").digest == Vocabulary(("cat", "sofa"), ((), ())).digest
    # Written beside figures that shall be found again: it must not change with the version.
    assert plain.digest == "89e0d6e5665c"


@pytest.mark.parametrize(
    ("name", "count", "some"),
    [
        ("voc", 21, {0: "background", 1: "aeroplane", 15: "person", 20: "tv monitor"}),
        ("context", 60, {0: "background", 1: "aeroplane", 11: "building", 59: "wood"}),
        ("coco", 80, {0: "person", 79: "toothbrush"}),
        ("coco-panoptic", 133, {0: "person", 80: "banner", 132: "rug-merged"}),
        ("coco-stuff", 171, {0: "person", 79: "toothbrush", 80: "banner", 170: "wood"}),
        ("ade20k", 150, {0: "wall", 12: "person", 23: "sofa", 149: "flag"}),
    ],
)
def test_built_in_vocabularies(name: str, count: int, some: dict[int, str]) -> None:
    vocabulary = Vocabulary.parse(name)
    assert len(vocabulary.classes) == count
    assert {index: vocabulary.classes[index] for index in some} == some
    assert sum(map(bool, vocabulary.synonyms)) > count / 2
    assert bool(vocabulary.background_words) == (vocabulary.background == 0)


def test_the_users_own_file_goes_before_a_built_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "voc").mkdir()
    assert len(Vocabulary.parse("voc").classes) == 21, "the folder of the data set is no class list"
    (tmp_path / "context").write_text("cat\n")
    assert Vocabulary.parse("context").classes == ("cat",)
    assert Vocabulary.parse("ade20k,").classes == ("ade20k",)
