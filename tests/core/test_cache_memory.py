"""Who goes to make room, and who waits for it."""

from __future__ import annotations

from mesh.core.cache_events import (
    AbandonLoad,
    BecameIdle,
    Drain,
    LoadBroken,
    LoadEnded,
    LoadFinished,
    Publish,
    Reason,
    RejectLoad,
    SizePredicted,
    StartFetch,
    StartLoad,
    StartUnload,
    TermsChanged,
    Tick,
    UnloadFinished,
    UnloadWanted,
)
from mesh.core.cache_table import CacheConfig
from mesh.core.errors import Code, NotFound, Unavailable
from mesh.core.policy import Policy
from mesh.core.types import CopyState as S
from mesh.core.types import LoadPriority
from tests.core.cache_driver import Driver


def of(kind, out):
    return [instruction for instruction in out if isinstance(instruction, kind)]


def test_a_load_goes_from_fetch_to_loaded_and_answers_before_it_publishes() -> None:
    driver = Driver()
    assert driver.want("a", 30) == (StartFetch("a", Reason.SLOT_FREE),)
    assert driver.cache.used_bytes == 30
    assert driver.send(SizePredicted("a", 40)) == (StartLoad("a", 40, Reason.SIZE_PREDICTED),)
    assert driver.send(LoadFinished("a", 35)) == (
        LoadEnded("a", Reason.LOADED, 35),
        Publish("a", S.LOADED, 35, Reason.LOADED),
    )
    assert driver.cache.used_bytes == 35


def test_the_least_recently_used_goes_and_its_bytes_count_until_it_is_gone() -> None:
    driver = Driver(capacity=100)
    for name in "abc":
        driver.load(name, 30)
    driver.touch("a")
    out = driver.want("d", 30)
    assert driver.state("d") is S.WAITING
    assert [(u.model_id, u.reason, u.second) for u in of(StartUnload, out)] == [
        ("b", Reason.EVICTED, "c")
    ]
    assert of(Publish, out) == [Publish("b", S.REMOVED, 0, Reason.EVICTED)]
    assert driver.cache.used_bytes == 90
    out = driver.send(UnloadFinished("b"))
    assert out == (StartFetch("d", Reason.MEMORY_FREED),)
    assert driver.cache.used_bytes == 90


def test_a_copy_with_requests_inside_is_not_evicted_until_it_is_idle() -> None:
    driver = Driver(capacity=100)
    driver.load("a", 60)
    driver.use("a", +1)
    assert of(StartUnload, driver.want("b", 60)) == []
    assert driver.cache.awaiting_idle
    driver.use("a", -1)
    assert [u.model_id for u in of(StartUnload, driver.send(BecameIdle("a")))] == ["a"]


def test_the_idle_one_goes_before_the_older_busy_one() -> None:
    driver = Driver(capacity=100)
    driver.load("busy", 50)
    driver.use("busy", +1)
    driver.load("idle", 50)
    assert [u.model_id for u in of(StartUnload, driver.want("c", 40))] == ["idle"]


def test_a_pinned_copy_stays_and_a_load_that_needs_its_memory_is_rejected() -> None:
    driver = Driver(capacity=100)
    driver.load("pinned", 60, pinned=True)
    out = driver.want("b", 60)
    assert [r.reason for r in of(RejectLoad, out)] == [Reason.NO_ROOM]
    driver.send(TermsChanged("pinned", False))
    assert [u.model_id for u in of(StartUnload, driver.want("b", 60))] == ["pinned"]


def test_a_proactive_load_never_evicts() -> None:
    driver = Driver(capacity=100)
    driver.load("a", 60)
    out = driver.want("b", 60, priority=LoadPriority.PROACTIVE)
    assert [r.reason for r in of(RejectLoad, out)] == [Reason.NO_FREE_MEMORY]
    assert driver.loaded() == {"a"}


def test_a_proactive_load_stays_out_of_the_unload_buffer() -> None:
    driver = Driver(capacity=100, buffer=10)
    driver.load("a", 60)
    assert of(RejectLoad, driver.want("b", 35, priority=LoadPriority.PROACTIVE))
    assert of(StartFetch, driver.want("c", 30, priority=LoadPriority.PROACTIVE))


def test_a_proactive_load_whose_prediction_grows_past_free_memory_is_rejected() -> None:
    driver = Driver(capacity=100)
    driver.load("a", 60)
    driver.want("b", 10, priority=LoadPriority.PROACTIVE)
    out = driver.send(SizePredicted("b", 50))
    assert [r.reason for r in of(RejectLoad, out)] == [Reason.NO_FREE_MEMORY]
    assert driver.cache.used_bytes == 60


def test_awaited_loads_go_first_and_an_awaited_request_upgrades_a_proactive_load() -> None:
    driver = Driver(slots=1)
    driver.want("running", 10)
    driver.want("p1", 10, priority=LoadPriority.PROACTIVE)
    driver.want("p2", 10, priority=LoadPriority.PROACTIVE)
    driver.want("awaited", 10)
    driver.want("p2", 10)  # somebody waits for it now
    order = []
    current = "running"
    while True:
        order.append(current)
        driver.send(SizePredicted(current, 10))
        fetches = of(StartFetch, driver.send(LoadFinished(current, 10)))
        if not fetches:
            break
        current = fetches[0].model_id
    assert order == ["running", "p2", "awaited", "p1"]


def test_no_more_loads_than_slots_are_under_way() -> None:
    driver = Driver(slots=2)
    assert len(of(StartFetch, driver.want("a") + driver.want("b") + driver.want("c"))) == 2
    assert driver.state("c") is S.QUEUED
    out = driver.send(LoadBroken("a", Unavailable("no")))
    assert [f.model_id for f in of(StartFetch, out)] == ["c"]


def test_the_buffer_is_kept_free_by_evicting_ahead_so_that_a_load_need_not_wait() -> None:
    driver = Driver(capacity=100, buffer=20)
    for name in "abcd":
        driver.load(name, 20)
    out = driver.want("e", 20)  # fits into the buffer at once, and one goes to restore it
    assert of(StartFetch, out)
    assert [u.model_id for u in of(StartUnload, out)] == ["a"]


def test_memory_is_handed_out_in_order_so_that_a_large_load_is_not_starved() -> None:
    driver = Driver(capacity=100, slots=2)
    driver.load("a", 50)
    driver.load("b", 50)
    driver.use("a", +1)
    driver.want("large", 90)
    driver.want("small", 10)
    assert (driver.state("large"), driver.state("small")) == (S.WAITING, S.WAITING)
    driver.send(UnloadFinished("b"))
    assert (driver.state("large"), driver.state("small")) == (S.WAITING, S.WAITING)
    driver.use("a", -1)
    driver.send(BecameIdle("a"))
    driver.send(UnloadFinished("a"))
    assert (driver.state("large"), driver.state("small")) == (S.LOADING, S.LOADING)


def test_a_small_load_that_would_fit_does_not_overtake_a_large_one_that_waits() -> None:
    driver = Driver(capacity=100, slots=3)
    driver.load("a", 50)
    driver.use("a", +1)
    driver.want("large", 90)
    driver.want("small", 10)
    assert (driver.state("large"), driver.state("small")) == (S.WAITING, S.WAITING)


def test_a_copy_that_kept_to_its_prediction_does_not_wait_for_one_that_did_not() -> None:
    driver = Driver(capacity=100)
    driver.load("busy", 30)
    driver.use("busy", +1)
    driver.want("b", 30)
    driver.want("c", 30)
    driver.send(SizePredicted("b", 30))
    driver.send(SizePredicted("c", 30))
    driver.send(LoadFinished("b", 50))
    assert driver.state("b") is S.SIZING
    ended = of(LoadEnded, driver.send(LoadFinished("c", 30)))
    assert ended == [LoadEnded("c", Reason.LOADED, 30)]


def test_a_model_larger_than_the_capacity_is_a_final_error_from_its_record() -> None:
    out = Driver(capacity=100).want("a", 101)
    [ended] = of(LoadEnded, out)
    assert ended.reason is Reason.TOO_LARGE
    assert ended.error.code is Code.FAILED_PRECONDITION
    assert "101 bytes" in ended.error.message
    assert "100" in ended.error.message


def test_a_model_larger_than_the_capacity_is_a_final_error_from_its_prediction() -> None:
    driver = Driver(capacity=100)
    driver.want("a")
    out = driver.send(SizePredicted("a", 101))
    assert of(LoadEnded, out)[0].error.code is Code.FAILED_PRECONDITION
    assert driver.cache.used_bytes == 0
    assert driver.state("a") is None


def test_a_measured_size_above_the_prediction_evicts_before_the_copy_is_loaded() -> None:
    driver = Driver(capacity=100)
    driver.load("a", 60)
    driver.want("b", 30)
    driver.send(SizePredicted("b", 30))
    out = driver.send(LoadFinished("b", 50))
    assert [u.model_id for u in of(StartUnload, out)] == ["a"]
    assert of(LoadEnded, out) == []
    assert driver.state("b") is S.SIZING
    out = driver.send(UnloadFinished("a"))
    assert of(LoadEnded, out) == [LoadEnded("b", Reason.LOADED, 50)]


def test_a_measured_size_that_nothing_can_make_room_for_unloads_the_model_itself() -> None:
    driver = Driver(capacity=100)
    driver.load("pinned", 60, pinned=True)
    driver.want("b", 30)
    driver.send(SizePredicted("b", 30))
    out = driver.send(LoadFinished("b", 50))
    [ended] = of(LoadEnded, out)
    assert ended.reason is Reason.MEASURED_TOO_LARGE
    assert ended.error.code is Code.UNAVAILABLE
    assert [u.model_id for u in of(StartUnload, out)] == ["b"]
    driver.send(UnloadFinished("b"))
    assert driver.cache.used_bytes == 60


def test_a_copy_larger_than_predicted_ends_its_overrun_though_no_other_copy_ever_rests() -> None:
    driver = Driver(capacity=100, memory_wait_ms=400)
    driver.load("a", 50)
    driver.use("a", +1)
    driver.load("b", 50, measured=60)
    assert (driver.state("b"), driver.cache.used_bytes) == (S.SIZING, 110)
    driver.send(Tick(), after_ms=98)
    assert driver.state("a") is S.LOADED
    driver.send(Tick(), after_ms=2)
    assert (driver.state("a"), driver.state("b")) == (S.UNLOADING, S.SIZING)
    driver.use("a", -1)
    driver.finish_unloads(driver.send(BecameIdle("a")))
    assert (driver.state("b"), driver.cache.used_bytes) == (S.LOADED, 60)


def test_a_copy_larger_than_predicted_goes_itself_when_requests_elsewhere_do_not_end() -> None:
    driver = Driver(capacity=100, memory_wait_ms=400)
    driver.load("a", 50)
    driver.use("a", +1)
    driver.load("b", 50, measured=60)
    out = driver.send(Tick(), after_ms=400)
    assert [ended.reason for ended in of(LoadEnded, out)] == [Reason.MEASURED_TOO_LARGE]
    assert of(LoadEnded, out)[0].error.code is Code.UNAVAILABLE
    driver.finish_unloads(out)
    assert driver.state("b") is None
    assert driver.cache.used_bytes <= 100


def test_a_load_that_waits_for_what_is_pinned_meanwhile_is_rejected_and_nobody_waits_for_it() -> (
    None
):
    driver = Driver(capacity=100, slots=3)
    driver.load("a", 50)
    driver.use("a", +1)
    driver.want("large", 60)
    driver.want("small", 20)
    assert (driver.state("large"), driver.state("small")) == (S.WAITING, S.WAITING)
    out = driver.send(TermsChanged("a", pinned=True))
    assert [(r.model_id, r.reason) for r in of(RejectLoad, out)] == [("large", Reason.NO_ROOM)]
    assert driver.state("small") is S.LOADING


def test_two_that_measure_too_large_do_not_wait_for_each_other() -> None:
    driver = Driver(capacity=100)
    driver.want("a", 40)
    driver.want("b", 40)
    driver.send(SizePredicted("a", 40))
    driver.send(SizePredicted("b", 40))
    driver.send(LoadFinished("a", 70))
    assert driver.state("a") is S.SIZING or driver.state("a") is S.LOADED
    out = driver.send(LoadFinished("b", 70))
    driver.finish_unloads(out)
    assert driver.loaded() == {"a"}


def test_a_load_beyond_its_time_out_ends_and_its_bytes_count_until_it_really_ended() -> None:
    driver = Driver(capacity=100, slots=1)
    driver.want("slow", 60, timeout_ms=1_000)
    driver.send(SizePredicted("slow", 60))
    assert driver.send(Tick()) == ()
    out = driver.send(Tick(), after_ms=1_000)
    [ended] = of(LoadEnded, out)
    assert ended.reason is Reason.LOAD_TIMEOUT
    assert ended.error.code is Code.UNAVAILABLE
    assert of(AbandonLoad, out) == [AbandonLoad("slow", Reason.LOAD_TIMEOUT)]
    assert driver.cache.used_bytes == 60
    assert of(RejectLoad, driver.want("slow"))[0].reason is Reason.STILL_UNLOADING
    assert [u.model_id for u in of(StartUnload, driver.send(LoadFinished("slow", 55)))] == ["slow"]
    driver.send(UnloadFinished("slow"))
    assert driver.cache.used_bytes == 0


def test_a_load_that_gets_no_memory_in_time_is_rejected_and_is_not_the_models_fault() -> None:
    driver = Driver(capacity=100)
    driver.load("busy", 90)
    driver.use("busy", +1)
    driver.want("b", 50, timeout_ms=1_000)
    out = driver.send(Tick(), after_ms=1_000)
    assert [r.reason for r in of(RejectLoad, out)] == [Reason.MEMORY_TIMEOUT]


def test_deleting_a_model_while_it_loads_answers_not_found_and_leaves_nothing() -> None:
    driver = Driver()
    driver.want("a", 30)
    out = driver.send(UnloadWanted("a", Reason.DELETED))
    assert isinstance(of(LoadEnded, out)[0].error, NotFound)
    assert of(AbandonLoad, out)
    driver.send(LoadBroken("a", Unavailable("stopped")))
    assert len(driver.cache) == 0
    assert driver.cache.used_bytes == 0


def test_unloading_waits_for_the_requests_inside() -> None:
    driver = Driver()
    driver.load("a", 30)
    driver.use("a", +2)
    out = driver.send(UnloadWanted("a", Reason.ASKED))
    assert of(StartUnload, out) == []
    assert of(Publish, out) == [Publish("a", S.REMOVED, 0, Reason.ASKED)]
    driver.use("a", -2)
    assert of(StartUnload, driver.send(BecameIdle("a")))


def test_a_copy_that_is_loaded_answers_again_at_once() -> None:
    driver = Driver()
    driver.load("a", 30)
    assert driver.want("a") == (LoadEnded("a", Reason.ALREADY_LOADED, 30),)


def test_a_draining_instance_rejects_loads_and_keeps_serving() -> None:
    driver = Driver(slots=1)
    driver.load("a", 30)
    driver.want("loading", 30)
    driver.want("queued", 10)
    out = driver.send(Drain())
    assert {(r.model_id, r.reason) for r in of(RejectLoad, out)} == {
        ("loading", Reason.DRAINING),
        ("queued", Reason.DRAINING),
    }
    assert of(AbandonLoad, out) == [AbandonLoad("loading", Reason.DRAINING)]
    assert driver.loaded() == {"a"}
    assert of(RejectLoad, driver.want("b"))[0].reason is Reason.DRAINING


def test_the_churn_guard_refuses_to_evict_what_was_in_use_a_moment_ago() -> None:
    driver = Driver(capacity=100, churn_ms=10_000)
    driver.load("a", 60)
    assert of(RejectLoad, driver.want("b", 60))[0].reason is Reason.CHURN
    driver.now_ms += 10_000
    assert of(StartUnload, driver.want("b", 60))


def test_the_unload_buffer_of_the_policy_lies_within_its_share() -> None:
    policy = Policy()
    small = CacheConfig.from_policy(policy, 10_000_000)
    large = CacheConfig.from_policy(policy, 10_000_000_000)
    assert small.unload_buffer_bytes == 1_000_000  # 10 %
    assert large.unload_buffer_bytes == 100_000_000  # 1 %


def test_a_copy_that_was_awaited_stays_for_its_first_request() -> None:
    driver = Driver(capacity=100, grace_ms=250)
    driver.load("busy", 50)
    driver.use("busy", +1)
    driver.load("fresh", 50)
    out = driver.want("c", 40)  # "busy" cannot go, and who waited for "fresh" is on the way
    assert of(StartUnload, out) == []
    assert driver.cache.awaiting_idle
    driver.touch("fresh")
    out = driver.send(BecameIdle("fresh"))
    assert [u.model_id for u in of(StartUnload, out)] == ["fresh"]


def test_a_copy_that_nobody_came_for_goes_after_its_grace() -> None:
    driver = Driver(capacity=100, grace_ms=250)
    driver.load("fresh", 90)
    assert of(StartUnload, driver.want("c", 40)) == []
    assert of(StartUnload, driver.send(Tick(), after_ms=100)) == []
    out = driver.send(Tick(), after_ms=250)
    assert [u.model_id for u in of(StartUnload, out)] == ["fresh"]


def test_a_proactive_copy_has_no_grace() -> None:
    driver = Driver(capacity=100, grace_ms=250)
    driver.load("ahead", 90, priority=LoadPriority.PROACTIVE)
    assert [u.model_id for u in of(StartUnload, driver.want("c", 40))] == ["ahead"]
