"""Check of docstrings, run by ``make lint``: prints those that open with a question word, and exits with 1 if there are any.

A docstring has to open with a verb ("Return", "Compute") or with the noun that is returned or represented. Folders and files to
check may be given as arguments: ``python tools/check_docstrings.py vilseg/model``.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

QUESTION_WORD = re.compile(r"\W*(What|Which|Whether|Where|How|Who|Of)\b")


def refused(source: str) -> Iterator[tuple[int, str]]:
    """Yield line number and first line of each docstring in Python code that opens with a question word or with "Of"."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and QUESTION_WORD.match(docstring):
                yield node.body[0].lineno, docstring.splitlines()[0]


def main(arguments: list[str]) -> int:
    """Check Python files tracked by git, print the docstrings found, and return the exit code.

    Args:
        arguments: files, or folders whose files are checked; all tracked files if empty.
    """
    listed = subprocess.run(["git", "ls-files", "*.py"], capture_output=True, text=True, check=True).stdout.split()
    files = [file for file in listed if not arguments or any(Path(file).is_relative_to(part) for part in arguments)]
    found = [(file, *each) for file in files if Path(file).exists() for each in refused(Path(file).read_text("utf-8"))]
    for file, line, text in found:
        print(f"{file}:{line}: {text}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
