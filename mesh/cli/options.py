"""The options that more than one command has, and how their values are read."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mesh.cli.formats import DetailFormat, ListFormat
from mesh.cli.quantities import parse_duration_ms


def duration_s(text: str) -> float:
    try:
        return parse_duration_ms(text) / 1000
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


TimeoutOption = Annotated[
    Any,
    typer.Option("--timeout", parser=duration_s, metavar="DURATION", help="Give up after so long."),
]
ListOption = Annotated[ListFormat, typer.Option("--output", "-o", help="How to show it.")]
DetailOption = Annotated[DetailFormat, typer.Option("--output", "-o", help="How to show it.")]
