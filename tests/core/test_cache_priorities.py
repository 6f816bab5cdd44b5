"""Who goes first, who may push whom out, what is kept, and what goes of itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mesh.core.cache_events import (
    BecameIdle,
    Instruction,
    LoadEnded,
    LoadFinished,
    Publish,
    Reason,
    RejectLoad,
    SizePredicted,
    StartFetch,
    StartUnload,
    TermsChanged,
    Tick,
    UnloadFinished,
)
from mesh.core.cache_table import CacheConfig
from mesh.core.policy import Policy
from mesh.core.types import CopyState as S
from mesh.core.types import LoadPriority
from mesh.core.usage import score_after
from tests.core.cache_driver import Driver

AWAITED, COPY, PROACTIVE = LoadPriority.AWAITED, LoadPriority.COPY, LoadPriority.PROACTIVE


def unloads(out: tuple[Instruction, ...] | list[Instruction]) -> list[str]:
    return [i.model_id for i in out if isinstance(i, StartUnload)]


def fetches(out: tuple[Instruction, ...] | list[Instruction]) -> list[str]:
    return [i.model_id for i in out if isinstance(i, StartFetch)]


def refusals(out: tuple[Instruction, ...] | list[Instruction]) -> list[tuple[str, Reason]]:
    return [(i.model_id, i.reason) for i in out if isinstance(i, RejectLoad)]


# ---- slots --------------------------------------------------------------------------------------


def test_awaited_loads_go_before_copies_and_copies_before_proactive_ones() -> None:
    driver = Driver(slots=1)
    driver.want("running", 10)
    driver.want("ahead", 10, priority=PROACTIVE)
    driver.want("copy", 10, priority=COPY)
    driver.want("awaited", 10)
    order = []
    name = "running"
    for _ in range(3):
        driver.send(SizePredicted(name, 10))
        name = fetches(driver.send(LoadFinished(name, 10)))[0]
        order.append(name)
    assert order == ["awaited", "copy", "ahead"]


@pytest.mark.parametrize("priority", [COPY, PROACTIVE])
def test_the_last_slot_is_for_awaited_loads(priority: LoadPriority) -> None:
    driver = Driver(slots=2)
    assert fetches(driver.want("first", 10, priority=priority)) == ["first"]
    assert fetches(driver.want("second", 10, priority=priority)) == []
    assert fetches(driver.want("awaited", 10)) == ["awaited"]


def test_a_copy_that_a_request_comes_to_wait_for_is_awaited_from_then_on() -> None:
    driver = Driver(slots=2)
    driver.want("first", 10, priority=COPY)
    driver.want("second", 10, priority=COPY)
    assert fetches(driver.want("second", 10)) == ["second"]
    driver.want("second", 10, priority=PROACTIVE)
    assert driver.cache.get("second").priority is AWAITED


# ---- who pushes whom out ------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["lru", "frequency"])
def test_a_copy_evicts_what_was_used_longer_ago(order: str) -> None:
    driver = Driver(capacity=100, eviction_order=order)
    driver.load("old", 60)
    out = driver.want("copy", 60, priority=COPY, last_used_at_ms=driver.now_ms + 1)
    assert unloads(out) == ["old"]


@pytest.mark.parametrize("order", ["lru", "frequency"])
def test_a_copy_does_not_evict_what_was_used_later(order: str) -> None:
    driver = Driver(capacity=100, eviction_order=order)
    driver.load("recent", 60)
    out = driver.want("copy", 60, priority=COPY, last_used_at_ms=driver.now_ms - 1_000)
    assert refusals(out) == [("copy", Reason.WORTH_LESS)]
    assert driver.loaded() == {"recent"}


def test_a_copy_with_a_past_elsewhere_evicts_what_is_used_less() -> None:
    driver = Driver(capacity=100, eviction_order="frequency")
    for name in ("a", "b"):
        driver.load(name, 50)
        driver.now_ms += 10_000
    past = 0.0
    for _ in range(500):  # many uses a second elsewhere
        past = score_after(past, 10, driver.now_ms, 3_600_000)
    assert unloads(driver.want("copy", 50, priority=COPY, use_score=past))


def test_a_copy_does_not_evict_what_was_loaded_for_requests_on_their_way() -> None:
    driver = Driver(capacity=100, grace_ms=250)
    driver.load("fresh", 60)
    out = driver.want("copy", 60, priority=COPY, last_used_at_ms=driver.now_ms + 1_000)
    assert refusals(out) == [("copy", Reason.WORTH_LESS)]


def test_a_copy_does_not_wait_for_busy_memory() -> None:
    driver = Driver(capacity=100)
    driver.load("busy", 60)
    driver.use("busy", +1)
    out = driver.want("copy", 60, priority=COPY, last_used_at_ms=driver.now_ms + 1)
    assert refusals(out) == [("copy", Reason.WORTH_LESS)]


def test_awaited_loads_get_memory_before_a_copy_that_came_first() -> None:
    driver = Driver(capacity=100, slots=3)
    driver.load("old", 60)
    driver.want("copy", 60, priority=COPY, last_used_at_ms=driver.now_ms + 1)
    assert driver.state("copy") is S.WAITING
    assert refusals(driver.want("awaited", 60)) == [("copy", Reason.WORTH_LESS)]
    assert fetches(driver.send(UnloadFinished("old"))) == ["awaited"]


def test_a_refused_copy_leaves_its_slot_to_who_waits() -> None:
    driver = Driver(capacity=100, slots=1)
    driver.load("recent", 60)
    driver.want("running", 10)
    driver.want("copy", 60, priority=COPY)
    driver.want("ahead", 10, priority=PROACTIVE)
    driver.send(SizePredicted("running", 10))
    out = driver.send(LoadFinished("running", 10))
    assert refusals(out) == [("copy", Reason.WORTH_LESS)]
    assert fetches(out) == ["ahead"]


def test_a_refused_copy_leaves_the_memory_that_is_free_to_who_waits_behind_it() -> None:
    driver = Driver(capacity=100, slots=2)
    driver.load("recent", 60)
    driver.want("running", 10)
    driver.want("copy", 60, priority=COPY)
    driver.want("behind", 20, priority=COPY)
    driver.cache.use_config(replace(driver.cache.config, load_slots=4))
    out = driver.send(Tick())
    assert refusals(out) == [("copy", Reason.WORTH_LESS)]
    assert fetches(out) == ["behind"]


def test_a_copy_that_outgrows_its_prediction_evicts_what_is_worth_less() -> None:
    driver = Driver(capacity=100)
    driver.load("old", 60)
    driver.want("copy", 30, priority=COPY, last_used_at_ms=driver.now_ms + 1)
    driver.send(SizePredicted("copy", 30))
    out = driver.send(LoadFinished("copy", 50))
    assert unloads(out) == ["old"]
    out = driver.send(UnloadFinished("old"))
    assert LoadEnded("copy", Reason.LOADED, 50) in out


@pytest.mark.parametrize("priority", [COPY, PROACTIVE])
def test_what_nobody_waits_for_goes_itself_rather_than_outgrow_others(
    priority: LoadPriority,
) -> None:
    driver = Driver(capacity=100)
    driver.load("recent", 60)
    driver.want("copy", 30, priority=priority)
    driver.send(SizePredicted("copy", 30))
    out = driver.send(LoadFinished("copy", 50))
    assert unloads(out) == ["copy"]
    assert driver.loaded() == {"recent"}


# ---- kept copies --------------------------------------------------------------------------------


def test_a_kept_copy_goes_after_all_others() -> None:
    driver = Driver(capacity=100)
    driver.load("kept", 40, kept=True)
    driver.load("other", 40)
    assert unloads(driver.want("next", 40)) == ["other"]


def test_a_kept_copy_goes_when_nothing_else_can() -> None:
    driver = Driver(capacity=100)
    driver.load("kept", 40, kept=True)
    driver.load("busy", 40)
    driver.use("busy", +1)
    assert unloads(driver.want("next", 40)) == ["kept"]


def test_a_kept_copy_does_not_go_for_a_load_that_nobody_waits_for() -> None:
    driver = Driver(capacity=100)
    driver.load("kept", 50, kept=True)
    out = driver.want("copy", 60, priority=COPY, last_used_at_ms=driver.now_ms + 1)
    assert refusals(out) == [("copy", Reason.WORTH_LESS)]


def test_within_the_share_the_most_recently_used_are_kept() -> None:
    driver = Driver(capacity=100, kept_share_max=0.5)
    for name in ("older", "newer"):
        driver.load(name, 40, kept=True)
    assert unloads(driver.want("next", 40)) == ["older"]  # only one fits the share


def test_a_copy_that_is_not_kept_any_more_is_like_any_other() -> None:
    driver = Driver(capacity=100)
    driver.load("kept", 40, kept=True)
    driver.load("other", 40)
    driver.send(TermsChanged("kept", False, kept=False))
    assert unloads(driver.want("next", 40)) == ["kept"]


# ---- idle time-out ------------------------------------------------------------------------------

IDLE_MS = 5_000


@pytest.mark.parametrize(
    ("sentence", "fields", "after_ms", "goes"),
    [
        ("unused for its time-out it goes", {}, IDLE_MS, True),
        ("not a moment earlier", {}, IDLE_MS - 2, False),
        ("without a time-out it stays", {"idle_unload_ms": 0}, 10 * IDLE_MS, False),
        ("a pinned one stays", {"pinned": True}, 10 * IDLE_MS, False),
        ("a kept one stays", {"kept": True}, 10 * IDLE_MS, False),
        ("a proactive one counts from its load", {"priority": PROACTIVE}, IDLE_MS, True),
        ("and stays until then", {"priority": PROACTIVE}, IDLE_MS - 2, False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_idle_unload(sentence: str, fields: dict[str, object], after_ms: int, goes: bool) -> None:
    driver = Driver()
    driver.load("m", 10, **{"idle_unload_ms": IDLE_MS, **fields})
    out = driver.send(Tick(), after_ms)
    assert unloads(out) == (["m"] if goes else [])
    if goes:
        assert Publish("m", S.REMOVED, 0, Reason.IDLE) in out


def test_a_copy_with_a_request_inside_is_not_idle_however_long_that_takes() -> None:
    driver = Driver()
    driver.load("m", 10, idle_unload_ms=IDLE_MS)
    driver.use("m", +1)
    assert unloads(driver.send(Tick(), 10 * IDLE_MS)) == []


def test_an_idle_time_out_that_is_taken_away_counts_no_more() -> None:
    driver = Driver()
    driver.load("m", 10, idle_unload_ms=IDLE_MS)
    driver.send(TermsChanged("m", False))
    assert unloads(driver.send(Tick(), 10 * IDLE_MS)) == []


# ---- memory that is all in use ------------------------------------------------------------------


def test_an_awaited_load_waits_for_busy_memory_instead_of_being_refused() -> None:
    driver = Driver(capacity=100, memory_wait_ms=10_000)
    driver.load("busy", 60)
    driver.use("busy", +1)
    assert refusals(driver.want("next", 60)) == []
    driver.use("busy", -1)
    assert unloads(driver.send(BecameIdle("busy"))) == ["busy"]
    assert fetches(driver.send(UnloadFinished("busy"))) == ["next"]


def test_it_waits_no_longer_than_it_may() -> None:
    driver = Driver(capacity=100, memory_wait_ms=10_000)
    driver.load("busy", 60)
    driver.use("busy", +1)
    driver.want("next", 60)
    assert refusals(driver.send(Tick(), 9_000)) == []
    assert refusals(driver.send(Tick(), 1_000)) == [("next", Reason.MEMORY_TIMEOUT)]


def test_a_copy_that_never_rests_is_closed_to_new_requests_after_a_while() -> None:
    driver = Driver(capacity=100, memory_wait_ms=10_000)
    driver.load("busy", 60)
    driver.use("busy", +1)
    driver.want("next", 60)
    assert driver.send(Tick(), 2_000) == ()
    out = driver.send(Tick(), 600)
    assert out == (Publish("busy", S.REMOVED, 0, Reason.EVICTED),)
    assert driver.cache.awaiting_idle
    driver.use("busy", -1)
    assert unloads(driver.send(BecameIdle("busy"))) == ["busy"]


def test_a_pinned_copy_that_never_rests_is_left_alone() -> None:
    driver = Driver(capacity=100, memory_wait_ms=10_000)
    driver.load("pinned", 50, pinned=True)
    driver.use("pinned", +1)
    driver.load("busy", 50)
    driver.use("busy", +1)
    driver.want("next", 50)
    out = driver.send(Tick(), 2_600)
    assert out == (Publish("busy", S.REMOVED, 0, Reason.EVICTED),)


@pytest.mark.parametrize("order", ["lru", "frequency"])
def test_64_clients_of_30_models_in_room_for_12_are_all_served(order: str) -> None:
    """Every client asks for a model, waits for its load, is answered, and asks for another."""
    driver = Driver(capacity=12, memory_wait_ms=10_000, grace_ms=250, eviction_order=order)
    waiting: dict[str, list[int]] = {}
    running: list[tuple[int, int, str]] = []  # (ends, client, model)
    next_model = [client % 30 for client in range(64)]
    served = loads = 0
    pod: list[Instruction] = []

    def ask(client: int) -> None:
        name = f"m{next_model[client]}"
        next_model[client] = (next_model[client] * 7 + client) % 30
        if driver.state(name) is S.LOADED:
            driver.use(name, +1)
            running.append((driver.now_ms + 20, client, name))
            return
        waiting.setdefault(name, []).append(client)
        if driver.state(name) in (None, S.REMOVED):
            pod.extend(driver.want(name, 1))

    for client in range(64):
        ask(client)
    while served < 2_000:
        while pod:
            match pod.pop(0):
                case StartFetch(name):
                    pod += driver.send(SizePredicted(name, 1))
                    pod += driver.send(LoadFinished(name, 1))
                case StartUnload(name):
                    pod += driver.send(UnloadFinished(name))
                    if waiting.get(name):
                        pod += driver.want(name, 1)
                case LoadEnded(name, Reason.LOADED):
                    loads += 1
                    assert waiting.get(name), f"{name} was loaded for nobody"
                    for client in waiting.pop(name):
                        driver.use(name, +1)
                        running.append((driver.now_ms + 20, client, name))
                case RejectLoad(name, reason):
                    raise AssertionError(f"{name} refused: {reason}")
        assert running, f"nothing moves after {served}: {driver.cache!r}"
        running.sort()
        ends, client, name = running.pop(0)
        driver.now_ms = max(driver.now_ms, ends)
        served += 1
        driver.use(name, -1)
        if not driver.cache.get(name).use.in_flight and driver.cache.awaiting_idle:
            pod.extend(driver.send(BecameIdle(name)))
        ask(client)
    assert loads < served


# ---- live policy, and what the instance says of itself ------------------------------------------


@pytest.mark.parametrize(("before", "after"), [("lru", "frequency"), ("frequency", "lru")])
def test_the_order_can_be_changed_while_copies_are_loaded(before: str, after: str) -> None:
    driver = Driver(capacity=100, eviction_order=before)
    driver.load("a", 40)
    driver.load("b", 40)
    driver.cache.use_config(replace(driver.cache.config, eviction_order=after))
    driver.touch("a")
    assert unloads(driver.want("c", 40)) == ["b"]


def test_more_load_slots_are_used_from_the_next_event_on() -> None:
    driver = Driver(slots=1)
    driver.want("a", 10)
    assert fetches(driver.want("b", 10)) == []
    driver.cache.use_config(replace(driver.cache.config, load_slots=2))
    assert fetches(driver.send(Tick())) == ["b"]


def test_the_capacity_of_a_live_cache_cannot_be_changed() -> None:
    driver = Driver(capacity=100)
    with pytest.raises(ValueError, match="capacity"):
        driver.cache.use_config(replace(driver.cache.config, capacity_bytes=50))


def test_an_order_that_does_not_exist_is_named_with_those_that_do() -> None:
    with pytest.raises(ValueError, match="'fifo' is none of frequency, lru"):
        Driver(eviction_order="fifo")


def test_the_policy_reaches_the_cache() -> None:
    policy = Policy(min_copies_capacity_share=0.25, placement_wait_ms=7, eviction_order="lru")
    config = CacheConfig.from_policy(policy, 1_000)
    assert (config.kept_share_max, config.memory_wait_ms) == (0.25, 7)
    assert config.eviction_order == "lru"


@pytest.mark.parametrize("order", ["lru", "frequency"])
def test_an_instance_whose_victim_is_used_more_says_so(order: str) -> None:
    rare, often = Driver(eviction_order=order), Driver(eviction_order=order)
    for driver in (rare, often):
        assert driver.cache.victim_score(driver.now_ms) == 0.0
        for step in range(40):
            if driver is often:
                driver.cache.get("m") and driver.touch("m")
            if step in (0, 39):
                driver.load("m" if step == 0 else "n", 10)
            driver.now_ms += 1_000
        driver.send(TermsChanged("n", True))
    assert 0.0 < rare.cache.victim_score(rare.now_ms) < often.cache.victim_score(often.now_ms)
