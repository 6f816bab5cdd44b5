"""Reads a process's ``/metrics`` and ``/readyz``; a few lines of text need no library."""

from __future__ import annotations

import contextlib
import re
import time
import urllib.error
import urllib.request

from bench.process import BenchError, Child

SCRAPE_TIMEOUT_S = 5.0
SERIES_TIMEOUT_S = 15.0


def page(port: int, path: str = "/metrics") -> str:
    address = f"http://127.0.0.1:{port}{path}"
    with urllib.request.urlopen(address, timeout=SCRAPE_TIMEOUT_S) as reply:
        text: str = reply.read().decode("utf-8")
    return text


def sums(port: int) -> dict[str, float]:
    """Every sample of a page by name, added up over its labels."""
    return parse(page(port))


def parse(text: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for line in text.splitlines():
        match = re.fullmatch(r"([a-zA-Z_:][\w:]*)(?:\{.*\})? (\S+)", line)
        if match is not None:
            found[match.group(1)] = found.get(match.group(1), 0.0) + float(match.group(2))
    return found


def wait_ready(child: Child, port: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    last = "no answer"
    while time.monotonic() < deadline:
        child.check()
        with contextlib.suppress(OSError):
            try:
                page(port, "/readyz")
            except urllib.error.HTTPError as error:
                last = f"{error.code} {error.read()[:200]!r}"
            else:
                return
        time.sleep(0.05)
    raise BenchError(f"{child.name} is not ready after {timeout_s:.0f} s: {last}\n{child.output()}")


def wait_for_series(child: Child, port: int, name: str, least: float) -> None:
    """Until the series has at least this value."""
    deadline = time.monotonic() + SERIES_TIMEOUT_S
    value = 0.0
    while time.monotonic() < deadline:
        child.check()
        value = sums(port).get(name, 0.0)
        if value >= least:
            return
        time.sleep(0.02)
    raise BenchError(f"{child.name}: {name} is {value:g} and does not become {least:g}")
