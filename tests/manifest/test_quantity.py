"""Kubernetes quantities and Go durations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.errors import InvalidArgument
from mesh.quantity import parse_duration_ms, parse_quantity


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("1", 1),
        ("+1", 1),
        ("-1", -1),
        ("200Mi", 200 * 2**20),
        ("1Ki", 1024),
        ("1k", 1000),
        ("1.5Gi", 3 * 2**29),
        (".5M", 500_000),
        ("1.G", 10**9),
        ("128e3", 128_000),
        ("1E3", 1_000),
        ("1E", 10**18),
        ("7Ei", 7 * 2**60),
        ("1e-3", 1),  # rounded up
        ("1500m", 2),
        ("1n", 1),
        ("9223372036854775807", 2**63 - 1),
        ("0.1234567890123456789012345Ti", 135742175047),
    ],
)
def test_quantity(text: str, value: int) -> None:
    assert parse_quantity(text, "x") == value


@pytest.mark.parametrize(
    "text",
    ["", "Mi", "1 Mi", "1mi", "1MB", "1KI", "1Zi", "0x10", "1e", "1e99", "1e999999999", "1,5",
     "--1", "1.2.3", "inf", "nan", "1_000", "9223372036854775808", "8Ei", "1" * 40, "١"],
)  # fmt: skip
def test_no_quantity(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^a\.b: expected "):
        parse_quantity(text, "a.b")


@given(st.integers(0, 10**9), st.sampled_from([("Ki", 1), ("Mi", 2), ("Gi", 3)]))
def test_binary_units_are_powers_of_1024(number: int, unit: tuple[str, int]) -> None:
    assert parse_quantity(f"{number}{unit[0]}", "x") == number * 1024 ** unit[1]


@given(st.text(max_size=40))
def test_any_text_is_a_quantity_or_refused(text: str) -> None:
    try:
        assert abs(parse_quantity(text, "x")) < 2**63
    except InvalidArgument as error:
        assert error.message.startswith("x: expected ")


@pytest.mark.parametrize(
    ("text", "value"),
    [("90s", 90_000), ("1m30s", 90_000), ("1.5h", 5_400_000), ("500ms", 500), ("0s", 0)],
)
def test_duration(text: str, value: int) -> None:
    assert parse_duration_ms(text, "x") == value


@pytest.mark.parametrize("text", ["", "90", "s", "1d", "-1s", "1 s", "1s1", "1e3s", "1s" * 20])
def test_no_duration(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^a\.b: expected a duration"):
        parse_duration_ms(text, "a.b")
