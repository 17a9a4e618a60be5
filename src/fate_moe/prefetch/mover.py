"""How do an expert's bytes get into a slot before, or when, they are needed?

The only mechanism of the engine: it asks the pure table for a slot and the pure queue for the next
read, lets reader threads fill slots, and locks what is being computed. One lock guards all three.
It knows records as bytes and slots as numbers, never tensors.

    speculate(prediction)   a guess: may be read when no demand waits, may be dropped
    lease(layer, experts)   a need: the experts as they land, residents first, locked until used
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

from fate_moe.cache.table import Entry, ExpertTable
from fate_moe.errors import CacheError
from fate_moe.prefetch.queue import ReadQueue
from fate_moe.store.reader import RecordReader
from fate_moe.telemetry import Counts, LinkMeter, MovingAverage, Telemetry
from fate_moe.types import ExpertKey, Phase, Prediction

_POLL_S = 60.0
"""Longest a lease waits without any landing before it says that the readers are stuck."""


class Mover:
    """Moves records from a reader into the slots of an arena. See the module's words."""

    def __init__(
        self,
        table: ExpertTable,
        reader: RecordReader,
        slot_view: Callable[[int], memoryview],
        record_bytes: Sequence[int],
        *,
        io_threads: int,
        window: int | None,
    ) -> None:
        """Start the reader threads.

        Args:
            table: owns keys and slots.
            reader: fills a buffer with a record.
            slot_view: gives the writable bytes of a slot.
            record_bytes: size of one record of each layer, [L].
            io_threads: how many reads run side by side.
            window: most guesses per layer; None = as many as one layer's computing time covers.
        """
        self.table = table
        self.telemetry = Telemetry(len(record_bytes))
        self.link = LinkMeter()
        self._reader = reader
        self._slot_view = slot_view
        self._record_bytes = tuple(record_bytes)
        self._window = window
        self._queue = ReadQueue(table.spare_slots * max(record_bytes, default=0))
        self._changed = threading.Condition()
        self._failed: dict[ExpertKey, Exception] = {}
        self._predictions: dict[int, Prediction] = {}
        self._wishes: deque[ExpertKey] = deque()  # guessed, but without a slot so far
        self._guesses_left = 0
        self._compute_s = MovingAverage()
        self._turn_began_s: float | None = None
        self._stall_at_turn_s = 0.0
        self._closed = False
        table.on_drop = self._count_waste
        self._threads = [
            threading.Thread(target=self._read_loop, name=f"fate-reader-{i}", daemon=True)
            for i in range(io_threads)
        ]
        for thread in self._threads:
            thread.start()

    def speculate(self, prediction: Prediction | None) -> None:
        """Start reading guessed experts, as many as the window allows, most likely first.

        Those that find no spare slot are tried again as the current lease gives slots back.
        Thread: the decode thread. Never blocks on a read.
        """
        if prediction is None:
            return
        layer = prediction.layer
        with self._changed:
            self._predictions[layer] = prediction
            self._wishes.extend(ExpertKey(layer, expert) for expert in prediction.ranked)
            self._guesses_left = self._allowed_guesses(self._record_bytes[layer])
            self.place_guesses()

    def lease(self, layer: int, experts: Sequence[int], phase: Phase) -> Lease:
        """Announce that `experts` of `layer` are needed now and lock them until they are used.

        Args:
            layer: MoE layer in [0, L).
            experts: distinct expert ids; this is also the order the cache policy learns them in.
            phase: what the counts are booked under.
        Returns:
            A context manager that yields (expert, slot) as experts land.
        Cost: a hit O(1) and no copy; a miss one read of the record.
        """
        if self._closed:
            raise CacheError("the engine is closed; load the model again")
        with self._changed:
            self._end_turn()
            self._wishes.clear()
            for stale in self._queue.cancel(self._is_unwanted(layer, set(experts))):
                self.telemetry.guesses_cancelled += 1
                self.telemetry.bytes_speculated -= self._record_bytes[stale.key.layer]
                self.telemetry.guesses -= 1
                self.table.drop(stale)
            keys = [ExpertKey(layer, e) for e in experts]
            self._count(layer, experts, [self.table.get(k) for k in keys], phase)
            lease = Lease(self, self._changed, keys)
            self._changed.notify_all()
        return lease

    def preload(self, keys: Sequence[ExpertKey], tick: Callable[[int], None]) -> None:
        """Read experts into free slots of their regions before the first request.

        Args:
            keys: experts to read, in this order, until their regions are full.
            tick: told how many have landed.
        Raises:
            ReadError: one of them could not be read.
        """
        with self._changed:
            entries = [e for k in keys if (e := self.table.place_resident(k)) is not None]
            for entry in entries:
                self._queue.push_demand(entry)
                self.telemetry.bytes_preloaded += self._record_bytes[entry.key.layer]
            self._changed.notify_all()
            while any(not entry.resident for entry in entries):
                for entry in entries:
                    if entry.key in self._failed:
                        raise self._failed.pop(entry.key)
                tick(sum(entry.resident for entry in entries))
                self._changed.wait(0.1)
        tick(len(entries))

    def reset(self) -> None:
        """Set all counts to zero; residents stay."""
        with self._changed:
            self.table.evictions = 0
            self.telemetry.reset()

    def close(self) -> None:
        """Stop the reader threads; a second call does nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():  # the collector runs on any thread
                thread.join()

    # The rest is called under the lock.

    def place(self, key: ExpertKey) -> Entry | None:
        """Give a missing expert a slot and queue its read, or None while there is no room."""
        entry = self.table.place_demand(key)
        if entry is not None:
            self._failed.pop(key, None)  # of a lease that ended before its read did
            self._queue.push_demand(entry)
            self.telemetry.bytes_demand += self._record_bytes[key.layer]
            self._changed.notify_all()  # the readers may have gone to sleep on an empty queue
        return entry

    def place_guesses(self) -> None:
        """Queue reads of wished-for experts while the window and the spare slots allow it."""
        while self._wishes and self._guesses_left > 0:
            key = self._wishes[0]
            read_bytes = self._record_bytes[key.layer]
            if self.table.get(key) is None:
                entry = self.table.place_guess(key) if self._queue.has_room(read_bytes) else None
                if entry is None:
                    return
                self._queue.push_guess(entry, read_bytes)
                self.telemetry.guesses += 1
                self.telemetry.bytes_speculated += read_bytes
                self._guesses_left -= 1
                self._changed.notify_all()
            self._wishes.popleft()

    def take_failure(self, key: ExpertKey) -> Exception | None:
        """Return why `key` could not be read, once."""
        return self._failed.pop(key, None)

    def join(self, key: ExpertKey, entry: Entry) -> None:
        """Lock an expert that has a slot; a guess still queued becomes a demand."""
        if entry.guessed and not entry.used:
            self.telemetry.guesses_used += 1
        entry.locks += 1
        self._queue.promote(key)

    def abandon(self, entry: Entry) -> None:
        """End a lease on an expert that was not computed; an unstarted read is withdrawn."""
        if self._queue.withdraw(entry.key) is not None:
            self.table.drop(entry)
        elif self.table.get(entry.key) is entry:
            self.table.unlock(entry)

    def end_stall(self, seconds: float) -> None:
        """Book time that computing waited for bytes."""
        self.telemetry.stall_s += seconds

    def _allowed_guesses(self, read_bytes: int) -> int:
        if self._window is not None:
            return self._window
        rate, compute_s = self.link.bytes_per_s, self._compute_s.value
        if rate is None or compute_s is None:
            return self.table.spare_slots
        return int(compute_s * rate / read_bytes)

    def _end_turn(self) -> None:
        # One turn = from one layer's demand to the next layer's; what it did not spend waiting
        # is the time that a guess made in it can hide behind.
        now, stalled = time.perf_counter(), self.telemetry.stall_s
        if self._turn_began_s is not None:
            spent = now - self._turn_began_s - max(0.0, stalled - self._stall_at_turn_s)
            self._compute_s.add(spent)
        self._turn_began_s, self._stall_at_turn_s = now, stalled

    def _is_unwanted(self, layer: int, wanted: set[int]) -> Callable[[ExpertKey], bool]:
        return lambda key: key.layer != layer or key.expert not in wanted

    def _count(
        self, layer: int, experts: Sequence[int], found: list[Entry | None], phase: Phase
    ) -> None:
        counts = Counts(requests=len(experts))
        for entry in found:
            if entry is None:
                counts.misses += 1
                continue
            counts.hits += entry.resident
            counts.late += not entry.resident
            counts.saved += entry.guessed and not entry.used
        prediction = self._predictions.pop(layer, None)
        if prediction is not None:
            counts.recall_of = len(experts)
            counts.recall_hit = len(set(experts) & set(prediction.ranked))
            counts.core_hit = len(set(experts) & set(prediction.ranked[: prediction.core]))
        self.telemetry.counts[phase][layer].add(counts)

    def _count_waste(self, entry: Entry) -> None:
        if entry.guessed and not entry.used and entry.resident:
            self.telemetry.bytes_wasted += self._record_bytes[entry.key.layer]

    def _read_loop(self) -> None:
        while True:
            with self._changed:
                while (entry := self._queue.pop()) is None:
                    if self._closed:
                        return
                    self._changed.wait()
                if self._closed:
                    return
                self.link.begin(time.perf_counter())
            read_bytes = self._record_bytes[entry.key.layer]
            failure: Exception | None = None
            try:
                self._reader.read_into(entry.key, self._slot_view(entry.slot)[:read_bytes])
            except Exception as error:  # noqa: BLE001 - crosses to the thread that waits for it
                failure = error
            with self._changed:
                self.link.end(time.perf_counter(), 0 if failure else read_bytes)
                self._settle(entry, failure)
                self._changed.notify_all()

    def _settle(self, entry: Entry, failure: Exception | None) -> None:
        if failure is None:
            self.table.landed(entry)
            return
        self.table.drop(entry)
        if entry.used or not entry.guessed:
            self._failed[entry.key] = failure


class Lease:
    """The experts one layer needs now: yields (expert, slot) as they land, residents first.

    Each expert is locked from the start of the lease until the next one is asked for, or the
    lease ends. Made by `Mover.lease`; used by one thread.
    """

    def __init__(self, mover: Mover, changed: threading.Condition, keys: list[ExpertKey]) -> None:
        """Lock what has a slot, place what has none. Runs under the mover's lock."""
        self._mover = mover
        self._changed = changed
        self._held: dict[ExpertKey, Entry] = {}
        self._homeless: list[ExpertKey] = []
        self._current: ExpertKey | None = None
        found = {key: mover.table.get(key) for key in keys}
        # Lock first: no expert of this lease may make room for another one of it.
        for key, entry in found.items():
            if entry is not None:
                mover.join(key, entry)
                self._held[key] = entry
        for key, entry in found.items():
            if entry is not None:
                mover.table.touch(entry)
            else:
                mover.table.note_miss(key)
                self._homeless.append(key)
        self._place_homeless()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._homeless.clear()
            self._release_current()
            for entry in self._held.values():
                self._mover.abandon(entry)
            self._held.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield (expert, slot).

        Raises:
            ReadError: a record of this lease could not be read.
        """
        while True:
            with self._changed:
                self._release_current()
                if not self._held and not self._homeless:
                    return
                key = self._wait_for_one()
                self._current = key
                slot = self._held[key].slot
            yield key.expert, slot

    def _wait_for_one(self) -> ExpertKey:
        began: float | None = None
        while True:
            self._place_homeless()
            for key, entry in self._held.items():
                if entry.resident:
                    if began is not None:
                        self._mover.end_stall(time.perf_counter() - began)
                    return key
                failure = self._mover.take_failure(key)
                if failure is not None:
                    del self._held[key]
                    raise failure
            began = time.perf_counter() if began is None else began
            if not self._changed.wait(_POLL_S):
                raise CacheError(f"no read landed within {_POLL_S:.0f} s; is the disk gone?")

    def _release_current(self) -> None:
        if self._current is not None:
            self._mover.table.unlock(self._held.pop(self._current))
            self._current = None
            self._place_homeless()
            if not self._homeless:
                self._mover.place_guesses()  # the slot that came free may serve one
            self._changed.notify_all()

    def _place_homeless(self) -> None:
        while self._homeless:
            entry = self._mover.place(self._homeless[0])
            if entry is None:
                return
            entry.locks += 1
            self._held[self._homeless.pop(0)] = entry
