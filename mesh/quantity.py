"""Amounts as Kubernetes resources write them: ``200Mi``, ``1.5G``, ``2e9``, and ``90s``.

Pure. A text that cannot be read raises ``InvalidArgument`` with the field's path, what was
expected and what was found. (The command line's own, laxer notation is ``mesh.cli.quantities``.)
"""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, Context, Decimal
from typing import Final

from mesh.core.errors import InvalidArgument

# Longer texts are no amounts; the bound keeps Decimal's work small.
_MAX_CHARS: Final = 32
_MAX_EXPONENT: Final = 18
_MAX_VALUE: Final = 2**63 - 1  # Kubernetes' own limit

_QUANTITY: Final = re.compile(
    r"(?P<number>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))"
    r"(?:(?P<suffix>[KMGTPE]i|[numkMGTPE])|[eE](?P<exponent>[+-]?[0-9]{1,3}))?"
)
_SUFFIX: Final[dict[str, Decimal]] = {
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    "k": Decimal(10**3),
    "M": Decimal(10**6),
    "G": Decimal(10**9),
    "T": Decimal(10**12),
    "P": Decimal(10**15),
    "E": Decimal(10**18),
    "Ki": Decimal(2**10),
    "Mi": Decimal(2**20),
    "Gi": Decimal(2**30),
    "Ti": Decimal(2**40),
    "Pi": Decimal(2**50),
    "Ei": Decimal(2**60),
}

# More digits than a text of 32 characters times the largest factor has: nothing is rounded off.
_EXACT: Final = Context(prec=100)

_DURATION: Final = re.compile(r"(?:[0-9]{1,9}(?:\.[0-9]{1,3})?(?:ms|s|m|h))+")
_DURATION_PART: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)")
_MILLISECONDS: Final = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000}


def parse_quantity(text: str, where: str) -> int:
    """A Kubernetes quantity as a whole number (bytes), fractions rounded up as Kubernetes does."""
    match = _QUANTITY.fullmatch(text) if len(text) <= _MAX_CHARS else None
    exponent = int(match["exponent"] or 0) if match else 0
    if match is None or abs(exponent) > _MAX_EXPONENT:
        raise InvalidArgument(
            f"{where}: expected a Kubernetes quantity such as 200Mi, 1.5G or 1048576; "
            f"found {text[:_MAX_CHARS]!r}"
        )
    factor = _SUFFIX[match["suffix"]] if match["suffix"] else Decimal(10) ** exponent
    exact = _EXACT.multiply(Decimal(match["number"]), factor)
    value = int(exact.to_integral_value(rounding=ROUND_CEILING))
    if abs(value) > _MAX_VALUE:
        raise InvalidArgument(f"{where}: expected at most {_MAX_VALUE}; found {text!r}")
    return value


def parse_duration_ms(text: str, where: str) -> int:
    """Milliseconds of ``90s``, ``1m30s``, ``1.5h`` or ``500ms``, as Go writes durations."""
    if len(text) > _MAX_CHARS or not _DURATION.fullmatch(text):
        raise InvalidArgument(
            f"{where}: expected a duration such as 90s, 1m30s or 500ms; found {text[:_MAX_CHARS]!r}"
        )
    parts = _DURATION_PART.findall(text)
    return int(sum(Decimal(number) * _MILLISECONDS[unit] for number, unit in parts))
