"""Prompt templates: the published sets, and lists of one's own."""

import hashlib
import tomllib
from pathlib import Path

import pytest

import vilseg
from vilseg.config import RunConfig
from vilseg.errors import ConfigError
from vilseg.text.prompt_templates import prompt_sets, resolve_templates

PACKAGE = Path(vilseg.__file__).parent


def test_clip_is_the_published_list() -> None:
    clip = resolve_templates("clip")
    assert len(clip) == len(set(clip)) == 80
    assert clip[0] == "a bad photo of a {}."
    assert clip[-1] == "a tattoo of the {}."
    # Of the lines of openai/CLIP's notebook and of open_clip's zero_shot_metadata.py, joined by newlines.
    assert hashlib.sha256("\n".join(clip).encode()).hexdigest()[:16] == "4f976686fb651bb5"


def test_the_short_set_is_a_part_of_it() -> None:
    assert prompt_sets() == ("clip", "short")
    assert len(resolve_templates("short")) == 7
    assert set(resolve_templates("short")) < set(resolve_templates("clip"))


def test_own_templates() -> None:
    assert resolve_templates("a map of {}") == ("a map of {}",)
    assert resolve_templates(["{}", "the {}."]) == ("{}", "the {}.")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("clib", "no set of prompts 'clib'; did you mean 'clip'"),
        ("none of them", "there are clip and short"),
        (["a photo"], "'a photo' must hold {} once"),
        (["{} and {}"], "must hold {} once"),
        (["{name}"], "must hold {} once"),
        ([], "there is no prompt"),
    ],
)
def test_wrong_templates_are_told(given: str | list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        resolve_templates(given)


def test_a_configuration_takes_the_name_of_a_set() -> None:
    assert RunConfig.load(None, ["segmentation.prompts=clip"]).segmentation.prompts == list(resolve_templates("clip"))
    assert RunConfig.load(None, ["segmentation.prompts=the {}"]).segmentation.prompts == ["the {}"]
    resolved = RunConfig.load(None, ["segmentation.prompts=short"])
    assert RunConfig.load(None).replace(**resolved.model_dump()) == resolved
    with pytest.raises(ConfigError, match=r"segmentation\.prompts.*did you mean 'short'"):
        RunConfig.load(None, ["segmentation.prompts=shorts"])


def test_data_files_are_in_the_wheel() -> None:
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = {path for glob in settings["package-data"]["vilseg.text"] for path in (PACKAGE / "text").glob(glob)}
    there = {path for path in (PACKAGE / "text").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert listed == there
    assert len(there) == 8
