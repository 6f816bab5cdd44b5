"""The values of ``-o``."""

from __future__ import annotations

from enum import Enum


class ListFormat(str, Enum):  # noqa: UP042 - typer shows the values of a str enum
    table = "table"
    wide = "wide"
    json = "json"
    yaml = "yaml"
    name = "name"


class DetailFormat(str, Enum):  # noqa: UP042
    text = "text"
    json = "json"
    yaml = "yaml"
