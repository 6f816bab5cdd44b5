"""Settings that cannot work are refused with their name."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh.instance.settings import InstanceSettings
from puller.settings import PullerSettings


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"capacity_bytes": 1_000}, "capacity_bytes"),
        ({"inference_threads": 0}, "inference_threads"),
        ({"etcd_endpoints": ()}, "etcd_endpoints"),
        ({"host": "0.0.0.0"}, "advertised_host"),
    ],
)
def test_a_setting_out_of_range_is_named(changes: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        InstanceSettings(puller=PullerSettings(cache_dir=Path("/tmp/x")), **changes)  # type: ignore[arg-type]


def test_every_address_is_fine_when_routers_are_told_one() -> None:
    settings = InstanceSettings(
        puller=PullerSettings(cache_dir=Path("/tmp/x")), host="0.0.0.0", advertised_host="pod-1"
    )
    assert settings.advertised_host == "pod-1"
