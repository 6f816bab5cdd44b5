"""What a scan of the models folder means: tables over signatures, without files."""

from __future__ import annotations

from mesh.folder_sync import FolderPlan, ScanDecision, Signature

SECOND_NS = 1_000_000_000
OLD = Signature(1, 10, 0)
NOW = 100 * SECOND_NS


def young(size_bytes: int = 10) -> Signature:
    return Signature(1, size_bytes, NOW)


def decided(
    changed: tuple[str, ...] = (), gone: tuple[str, ...] = (), unsettled: tuple[str, ...] = ()
) -> ScanDecision:
    return ScanDecision(changed, gone, unsettled)


def test_what_lies_there_for_long_is_taken_at_once() -> None:
    assert FolderPlan().scan({"b": OLD, "a": OLD}, NOW) == decided(changed=("a", "b"))


def test_what_was_just_written_is_taken_when_it_stayed_the_same() -> None:
    plan = FolderPlan()
    assert plan.scan({"a": young()}, NOW) == decided(unsettled=("a",))
    assert plan.scan({"a": young()}, NOW) == decided(changed=("a",))


def test_what_still_grows_is_left_alone() -> None:
    plan = FolderPlan()
    for size in range(1, 6):
        assert plan.scan({"a": young(size)}, NOW) == decided(unsettled=("a",))


def test_an_empty_file_is_not_complete_however_old() -> None:
    assert FolderPlan().scan({"a": Signature(1, 0, 0)}, NOW) == decided(unsettled=("a",))


def test_what_was_dealt_with_comes_again_only_when_it_changes() -> None:
    plan = FolderPlan()
    plan.scan({"a": OLD}, NOW)
    plan.done("a")
    assert plan.scan({"a": OLD}, NOW) == decided()
    other = Signature(1, 10, 0, identity=7)
    assert plan.scan({"a": other}, NOW) == decided(changed=("a",))


def test_what_was_not_dealt_with_comes_again() -> None:
    plan = FolderPlan()
    plan.scan({"a": OLD}, NOW)
    assert plan.scan({"a": OLD}, NOW) == decided(changed=("a",))


def test_what_is_gone_is_told_until_it_is_forgotten() -> None:
    plan = FolderPlan()
    plan.scan({"a": OLD}, NOW)
    plan.done("a")
    assert plan.scan({}, NOW) == decided(gone=("a",))
    plan.forget("a")
    assert plan.scan({}, NOW) == decided()
    assert plan.scan({"a": OLD}, NOW) == decided(changed=("a",))
