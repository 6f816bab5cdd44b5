"""Which ServingRuntime is to run a model, by KServe's rules. Pure.

A runtime that is named is taken or refused, whatever else there is. Without a name: the namespace's
own runtimes go before the cluster's, a higher ``priority`` of the format before a lower one and
before none, the one created later before the earlier, then by name. It has to list the format with
``autoSelect``, in the version that the model names (if it names one), with the protocol that the
model names, and to be ``multiModel`` and not ``disabled``. A namespace's runtime hides the
cluster's of the same name.

Wider than KServe in two points. A version covers what is more exact than itself: ``1`` covers
``1.3.2``. And whoever speaks the Open Inference Protocol, over REST or gRPC, counts for v1, v2 and
grpc-v2: the router translates between them.

Refusals are values (``NotChosen``) with one of KServe's reasons and a message that names what was
looked for and what stood in the way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final, Literal

from mesh.serving_runtime import ServingRuntime

Reason = Literal["RuntimeNotRecognized", "RuntimeDisabled", "NoSupportingRuntime"]

_TRANSLATED: Final = frozenset({"v1", "v2", "grpc-v2"})
_SPOKEN: Final = frozenset({"v2", "grpc-v2"})
_SHOWN_MAX: Final = 8  # runtimes or formats in a message


@dataclass(frozen=True, slots=True)
class RuntimeWish:
    """What a model asks for; "" where it does not say. ``runtime``: one by name."""

    model_type: str = ""
    version: str = ""
    protocol: str = ""
    runtime: str = ""


@dataclass(frozen=True, slots=True)
class RuntimeOffer:
    """``cluster``: of the whole cluster and not of the namespace. ``created_at``: RFC 3339 in UTC,
    as the API server writes it."""

    runtime: ServingRuntime
    cluster: bool = False
    created_at: str = ""


@dataclass(frozen=True, slots=True)
class Chosen:
    """``explicit``: the model named it, so that nothing else will do."""

    name: str
    cluster: bool
    explicit: bool


@dataclass(frozen=True, slots=True)
class NotChosen:
    reason: Reason
    message: str


def choose_runtime(wish: RuntimeWish, offers: Collection[RuntimeOffer]) -> Chosen | NotChosen:
    """``offers``: the cluster's runtimes and those of the model's own namespace."""
    visible = _visible(offers)
    if wish.runtime:
        return _named(wish, visible)
    able = [offer for offer in visible if not _obstacle(wish, offer.runtime, auto=True)]
    if not able:
        return NotChosen("NoSupportingRuntime", _nobody(wish, visible))
    # Stable sorts, the least important first: times sort as text, but the other way round.
    able.sort(key=lambda offer: offer.runtime.name)
    able.sort(key=lambda offer: offer.created_at, reverse=True)
    able.sort(key=lambda offer: (offer.cluster, -_priority(wish, offer.runtime)))
    return Chosen(able[0].runtime.name, able[0].cluster, explicit=False)


def _visible(offers: Iterable[RuntimeOffer]) -> list[RuntimeOffer]:
    ordered = sorted(offers, key=lambda offer: offer.cluster)
    by_name: dict[str, RuntimeOffer] = {}
    for offer in ordered:
        by_name.setdefault(offer.runtime.name, offer)
    return list(by_name.values())


def _named(wish: RuntimeWish, visible: Collection[RuntimeOffer]) -> Chosen | NotChosen:
    for offer in visible:
        if offer.runtime.name != wish.runtime:
            continue
        if offer.runtime.disabled:
            return NotChosen("RuntimeDisabled", f"the runtime {wish.runtime!r} is disabled")
        obstacle = _obstacle(wish, offer.runtime, auto=False)
        if obstacle:
            message = f"the runtime {wish.runtime!r} cannot serve {_shown(wish)}: {obstacle}"
            return NotChosen("NoSupportingRuntime", message)
        return Chosen(wish.runtime, offer.cluster, explicit=True)
    there = _listed(offer.runtime.name for offer in visible)
    return NotChosen(
        "RuntimeNotRecognized",
        f"there is no ServingRuntime or ClusterServingRuntime {wish.runtime!r}; there is: {there}",
    )


def _obstacle(wish: RuntimeWish, runtime: ServingRuntime, *, auto: bool) -> str:
    """Why the runtime does not serve that, "" when it does."""
    if runtime.disabled:
        return "it is disabled"
    if not runtime.multi_model:
        return "it is not multiModel, so it runs one model a pod and not in a mesh"
    formats = [one for one in runtime.formats if one.name == wish.model_type]
    if not formats:
        return f"its formats are {_listed(runtime.model_types)}"
    if wish.version:
        formats = [one for one in formats if _covers(one.version, wish.version)]
        if not formats:
            entries = (one for one in runtime.formats if one.name == wish.model_type)
            versions = _listed(one.version or "(none named)" for one in entries)
            return f"its versions of the format are {versions}"
    if auto and not any(one.auto_select for one in formats):
        return "it has no autoSelect for the format, so it has to be named"
    if not _speaks(wish.protocol, runtime.protocol_versions):
        return f"its protocols are {_listed(runtime.protocol_versions)}"
    return ""


def _covers(offered: str, wanted: str) -> bool:
    return bool(offered) and (wanted == offered or wanted.startswith(offered + "."))


def _speaks(wanted: str, offered: tuple[str, ...]) -> bool:
    if not wanted or not offered or wanted in offered:
        return True
    return wanted in _TRANSLATED and not _SPOKEN.isdisjoint(offered)


def _priority(wish: RuntimeWish, runtime: ServingRuntime) -> int:
    """Of the first entry of that format, as KServe has it; 0 for none (the least given is 1)."""
    for one in runtime.formats:
        if one.name == wish.model_type:
            return one.priority or 0
    return 0


def _nobody(wish: RuntimeWish, visible: Collection[RuntimeOffer]) -> str:
    said = f"no runtime supports {_shown(wish)}"
    if not visible:
        return f"{said}: there is no ServingRuntime in the namespace and no ClusterServingRuntime"
    near = [offer.runtime for offer in visible if wish.model_type in offer.runtime.model_types]
    if near:
        reasons = [f"{one.name}: {_obstacle(wish, one, auto=True)}" for one in near[:_SHOWN_MAX]]
        return f"{said}; {'; '.join(reasons)}"
    formats = {name for offer in visible for name in offer.runtime.model_types}
    return f"{said}; formats that runtimes list: {_listed(sorted(formats))}"


def _shown(wish: RuntimeWish) -> str:
    version = f" version {wish.version!r}" if wish.version else ""
    protocol = f" by {wish.protocol}" if wish.protocol else ""
    return f"the format {wish.model_type!r}{version}{protocol}"


def _listed(names: Iterable[str]) -> str:
    unique = list(dict.fromkeys(names))
    more = f" and {len(unique) - _SHOWN_MAX} more" if len(unique) > _SHOWN_MAX else ""
    return (", ".join(unique[:_SHOWN_MAX]) or "none") + more
