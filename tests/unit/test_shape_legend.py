"""Every shape suffix in the library is made of letters of the legend in vilseg/model/__init__.py."""

import ast
import re
from pathlib import Path

import vilseg.model

LIBRARY = Path(vilseg.model.__file__).parents[1]
LEGEND = dict(re.findall(r"^    ([A-Za-z])  (\S.*)$", vilseg.model.__doc__ or "", re.MULTILINE))
SUFFIX = re.compile(r"[a-z][a-z0-9_]*_([A-Z0-9hw]+)")


def shape_suffixes(source: str) -> set[tuple[str, str]]:
    """Suffix and name of every variable, argument and attribute in ``source`` that carries a shape."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name) | ast.keyword(arg=str(name)):
                names.add(name)
    matches = [(name, SUFFIX.fullmatch(name)) for name in names]
    return {(match[1], name) for name, match in matches if match and not match[1].isdigit()}


def test_the_legend_defines_each_letter_once() -> None:
    letters = re.findall(r"^    ([A-Za-z])  ", vilseg.model.__doc__ or "", re.MULTILINE)
    assert sorted(letters) == sorted(set(letters))
    assert {"B", "N", "D", "h", "w"} <= set(letters)


def test_suffixes_use_letters_of_the_legend() -> None:
    found = {
        (file.relative_to(LIBRARY).as_posix(), name)
        for file in LIBRARY.rglob("*.py")
        for suffix, name in shape_suffixes(file.read_text(encoding="utf-8"))
        if not set(suffix) <= set(LEGEND) | set("0123456789")
    }
    assert not found
