"""``vilseg key``: creation of API keys for ``vilseg serve``."""

from __future__ import annotations

from typing import Annotated

import typer

from cli import console
from cli.options import Json


def key(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    file: Annotated[str, typer.Option(help="File or URI of the keys; made where it is not.")],
    json: Json = False,
) -> None:
    """Create an API key for 'vilseg serve --keys'. It is printed once; the file stores only its hash.

    Example: vilseg key anna --file keys.txt
    """
    from serve.api_keys import add_key

    made = add_key(file, name)
    console.log(f"the key of {name}; delete the line {name} of {file} to take it back")
    console.print_result({"name": name, "key": made, "file": file}, as_json=json, text=made)
