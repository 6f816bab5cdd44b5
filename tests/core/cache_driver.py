"""Drives a cache in tests: sends events, validates the books after each, plays an obedient pod."""

from __future__ import annotations

from mesh.core.cache import Cache
from mesh.core.cache_check import validate
from mesh.core.cache_events import (
    Event,
    Instruction,
    LoadFinished,
    LoadWanted,
    SizePredicted,
    StartUnload,
    UnloadFinished,
)
from mesh.core.cache_table import CacheConfig
from mesh.core.types import CopyState


class Driver:
    def __init__(
        self,
        capacity: int = 100,
        slots: int = 2,
        buffer: int = 0,
        churn_ms: int = 0,
        grace_ms: int = 0,
        **fields: object,
    ) -> None:
        config = CacheConfig(capacity, slots, buffer, 10, churn_ms, grace_ms, **fields)  # type: ignore[arg-type]
        self.cache = Cache(config)
        self.now_ms = 1_000_000

    def send(self, event: Event, after_ms: int = 1) -> tuple[Instruction, ...]:
        self.now_ms += after_ms
        out = self.cache.handle(event, self.now_ms)
        validate(self.cache)
        return out

    def want(self, model_id: str, size: int = 0, **fields: object) -> tuple[Instruction, ...]:
        fields.setdefault("timeout_ms", 60_000)
        return self.send(LoadWanted(model_id, size, **fields))  # type: ignore[arg-type]

    def load(self, model_id: str, size: int, measured: int = 0, **fields: object) -> None:
        """Through to LOADED (or SIZING, when ``measured`` does not fit); unloads are obeyed."""
        self.finish_unloads(self.want(model_id, size, **fields))
        self.finish_unloads(self.send(SizePredicted(model_id, size)))
        self.finish_unloads(self.send(LoadFinished(model_id, measured or size)))

    def finish_unloads(self, out: tuple[Instruction, ...]) -> list[Instruction]:
        """Answer each StartUnload at once; returns what that led to."""
        more: list[Instruction] = []
        for instruction in out:
            if isinstance(instruction, StartUnload):
                after = self.send(UnloadFinished(instruction.model_id))
                more += [*after, *self.finish_unloads(after)]
        return more

    def use(self, model_id: str, change: int) -> None:
        use = self.cache.get(model_id).use
        use.in_flight += change
        if change > 0:
            self.now_ms += 1
            use.last_used_at_ms = self.now_ms
            use.uses += 1

    def touch(self, model_id: str) -> None:
        self.use(model_id, +1)
        self.use(model_id, -1)

    def state(self, model_id: str) -> CopyState | None:
        copy = self.cache.get(model_id)
        return None if copy is None else copy.state

    def loaded(self) -> set[str]:
        return {c.model_id for c in self.cache.copies() if c.state is CopyState.LOADED}
