"""Sections of ``RESULTS.md`` that benchmarks update."""

from __future__ import annotations

import re
import time
from pathlib import Path

from vilseg.errors import DataError


def replace_section(file: Path, name: str, text: str) -> None:
    """Replace the text between ``<!-- name -->`` and ``<!-- /name -->`` in ``file`` by today's date and ``text``.

    Raises:
        DataError: the file does not contain both marks.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before = file.read_text()
    if begin not in before or end not in before:
        raise DataError(f"{file} has no section between {begin} and {end} to write the table into")
    section = f"{begin}\n{time.strftime('%Y-%m-%d')}.\n\n{text}\n{end}"
    file.write_text(re.sub(f"{re.escape(begin)}.*{re.escape(end)}", lambda _: section, before, flags=re.DOTALL))
