"""``vilseg doctor``: checks of the installation and of services."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from cli import console
from cli.options import Json, stdout_to_stderr


def doctor(
    store: Annotated[
        list[str] | None, typer.Option(help="Folder or s3:// URI to try writing to; several times.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster (HEAD:6379, ray://…) or its job server (http://…); RAY_ADDRESS without it."),
    ] = None,
    json: Json = False,
) -> int:
    """Check the installation and the services, and print remedies; exits with 1 if something required is missing.

    Example: vilseg doctor --store s3://bucket --address http://head:8265
    """
    from cli import diagnostics

    with stdout_to_stderr():
        found = list(diagnostics.main(address=address or os.environ.get("RAY_ADDRESS"), stores=store or []))
    healthy = all(finding.status != "missing" for finding in found)
    if json:
        console.print_result({"ok": healthy, "found": [vars(finding) for finding in found]}, as_json=True, text="")
    else:
        console.print_findings(found)
    return 0 if healthy else 1
