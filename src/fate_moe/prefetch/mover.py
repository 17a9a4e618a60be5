"""How does an expert get into a slot before, or when, it is needed?

The only mechanism of the engine: it asks the pure table for a slot and the pure queue for the next
reads, lets reader threads fill slots, and locks what is being computed. One lock guards all three.
It knows records as bytes and slots as numbers, never tensors. Waking a thread takes as long as a
small read: in decode those come in by themselves, or are read by whoever waits for them.

    speculate(prediction)   a guess: may be read when no demand waits, may be dropped
    lease(choice)           a need: the experts as they land, residents first, locked until used

One lease is open at a time; other threads wait for it. An interrupt (Ctrl-C) may tear a critical
section apart; the next lease sees that and starts from an empty table, which costs time, never
tokens.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from fate_moe.cache.table import Entry, ExpertTable, Part
from fate_moe.errors import CacheError
from fate_moe.prefetch.benefit import Benefit
from fate_moe.prefetch.filler import Filler, Slots
from fate_moe.prefetch.lease import POLL_S, Lease
from fate_moe.prefetch.parts import Parts
from fate_moe.prefetch.queue import ReadQueue
from fate_moe.prefetch.section import Section
from fate_moe.prefetch.threads import ReaderThreads
from fate_moe.prefetch.turns import Turns
from fate_moe.prefetch.wishes import Wishes
from fate_moe.store.reader import RecordReader
from fate_moe.telemetry import LinkMeter, Telemetry
from fate_moe.types import Choice, ExpertKey, Phase, Prediction


class Mover:
    """Moves records from a reader into the slots of an arena. See the module's words."""

    def __init__(
        self,
        table: ExpertTable,
        reader: RecordReader,
        slots: Slots,
        record_bytes: Sequence[int],
        *,
        io_threads: int,
        window: int | None,
        guess_levels: int = 1,
        head_bytes: Sequence[int] = (),
    ) -> None:
        """Start the reader threads.

        Args:
            table: owns keys and slots.
            reader: fills a buffer with a record.
            slots: what the table's slots are.
            record_bytes: size of one record of each layer, [L].
            io_threads: how many reads run side by side.
            window: most guesses per layer; None = as many as one layer's computing time covers.
            guess_levels: of guessing, see `Benefit`; with a window there is no choice.
            head_bytes: what the read of an INT2 head brings, [L]; empty where there are none.
        """
        self.benefit = Benefit(guess_levels, is_fixed=window is not None)
        self.table = table
        self.telemetry = Telemetry(len(record_bytes))
        self.link = LinkMeter()
        self._parts = Parts(record_bytes, head_bytes)
        self.filler = Filler(reader, slots, self._parts, self.link)
        self._queue = ReadQueue(self._parts.bytes)
        lock = threading.RLock()  # the collector may call `close` on a thread that holds it
        self._changed = threading.Condition(lock)  # something landed, or a lease ended
        self._failed: dict[ExpertKey, Exception] = {}
        self._predictions: dict[int, Prediction] = {}
        self._wishes = Wishes()
        self.turns = Turns(window, self.link, self.telemetry, self.benefit)
        self._owner: int | None = None  # thread that holds the open lease
        self.section = Section(self._changed)
        self._closed = False
        table.on_drop = self._count_waste
        self._readers = ReaderThreads(
            io_threads, lock, self._take_batch, self.filler.fill, self._end
        )

    def guess_level(self, tokens: int) -> int:
        """Say how much should be guessed in a step, see `Benefit`; all there is for a prompt."""
        return self.benefit.level if tokens == 1 else self.benefit.levels - 1

    def speculate(self, prediction: Prediction | None) -> None:
        """Start reading guessed experts, as many as the window allows, most likely first.

        Those that find no spare slot are tried again as the current lease gives slots back. A
        second guess for a layer takes the place of the first: what it does not name and no reader
        has begun is dropped; it has what the first left of the window.
        Thread: the decode thread. Never blocks on a read.
        """
        if prediction is None:
            return
        layer = prediction.layer
        with self.section:
            self._settle_landed()
            if layer in self._predictions:
                self._take_back_guesses(prediction)
            else:
                read_bytes, turns = self._parts.record_bytes[layer], self.turns
                window = turns.window(read_bytes, self.table.spare_slots)
                if turns.phase is Phase.PREFILL:
                    self.table.lend(min(window, len(prediction.ranked)), layer)
                self._wishes.open(window, turns.least_chance(read_bytes))
            self._predictions[layer] = prediction
            self.table.expect(prediction)
            self._wishes.add(prediction)
            self.place_guesses()

    def lease(self, choice: Choice) -> Lease:
        """Announce that experts of a layer are needed now and lock them until they are used.

        Args:
            choice: what the router chose.
        Returns:
            A context manager that yields lists of (expert, slot, low) as experts land: in decode
            all that have landed; in prefill one: it has many tokens, and its slot is wanted.
        Cost: a hit O(1) and no copy; a miss one read of the record.
        """
        self.begin_lease()
        with self.section:
            self.turns.begin(choice.layer, choice.phase)
            self._wishes.clear()
            keys = [ExpertKey(choice.layer, e) for e in choice.experts]
            for stale in self._cancel(lambda key: key not in keys):
                self._take_back_guess(stale)
            by_itself = self.filler.takes(choice.phase)
            while not by_itself and self.filler.under_way and self.filler.wait(POLL_S):
                self._settle_landed()  # from here on the reader threads say what has landed
            self._settle_landed()
            choice = self._parts.lowered(choice, self.table)
            self._count(choice, keys)
            self.table.begin(choice)
            together = len(keys) if by_itself or choice.phase is Phase.DECODE else 1
            return Lease(self, choice, keys, together)

    def begin_lease(self) -> None:
        """Wait until no other thread computes; start anew if a lease before left things torn."""
        with self._changed:
            me = threading.get_ident()
            if self._owner == me:  # this thread's last lease was interrupted before it could end
                self._owner, self.section.torn = None, True
            while self._owner is not None and not self._closed:
                if not self._changed.wait(POLL_S):
                    raise CacheError(f"another thread has been computing for over {POLL_S:.0f} s")
            if self._closed:
                raise CacheError("the engine is closed; load the model again")
            self._owner = me
            if self.section.torn:
                self._start_anew()

    def end_lease(self) -> None:
        """Let the next lease begin."""
        with self._changed:
            self.turns.end_lease()
            self._owner = None
            self._changed.notify_all()

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
                self.telemetry.bytes_preloaded += self._parts.bytes(entry)
            self._readers.wake()
            self.start_reads()
            while any(not entry.resident for entry in entries):
                for key in self._failed.keys() & {entry.key for entry in entries}:
                    raise self._failed.pop(key)
                tick(sum(entry.resident for entry in entries))
                self.wait(0.1)
        tick(len(entries))

    def reset(self) -> None:
        """Set all counts to zero; residents stay, guesses nobody has asked for go."""
        with self.section:
            self._settle_landed()
            for entry in self._cancel(lambda key: True):
                self.table.give_back(entry)
            for entry in self.table.entries():
                entry.guessed = False  # what was guessed before does not count as a guess now
            self.table.evictions = 0
            self.telemetry.reset()

    def close(self) -> None:
        """Stop the reader threads; a second call does nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._readers.close()
        self.table.on_drop = lambda entry: None  # the slots go with the last user, no collector

    # The rest is called under the lock.

    def place(self, key: ExpertKey, low: bool) -> Entry | None:
        """Give a missing expert a slot and queue its read, or None while there is no room."""
        entry = self.table.place_demand(key)
        if entry is not None:
            self._failed.pop(key, None)  # of a lease that ended before its read did
            entry.part = self._parts.of(key.layer, low)
            self._demand(entry)
        return entry

    def place_guesses(self) -> None:
        """Queue reads of wished-for experts while the window and the spare slots allow it."""
        while (key := self._wishes.first()) is not None:
            low = key.expert in self._predictions[key.layer].low
            entry = self.table.get(key)
            if entry is None:
                entry = self.table.place_guess(key)
                if entry is None:
                    break
                entry.part = self._parts.of(key.layer, low)
                self._guess(entry)
            elif entry.part is Part.HEAD and entry.resident and not (low or entry.locks):
                self.table.upgrade(entry)
                self._guess(entry)
            self._wishes.pop()
        self.start_reads()

    def start_reads(self) -> None:
        """Begin in the background what is queued, where it comes in that way."""
        if self._queue and self.filler.takes(self.turns.phase):
            self.filler.start(self._queue.take_all())

    def wait(self, most_s: float) -> bool:
        """Wait until a read has landed or failed; False after `most_s`."""
        filler, failures = self.filler, list[Exception | None]()
        batch = self._queue.take_demands(filler.batch_bytes) if self._reads_here() else []
        if not batch and not filler.under_way:
            return self._changed.wait(most_s)
        self._begin(batch)
        self._changed.release()
        try:
            if batch:
                failures = list(filler.fill(batch))
            elif not filler.wait(most_s):
                most_s = 0.0
        finally:
            self._changed.acquire()
        if not most_s and filler.under_way:  # without any, `reset` on another thread took them in
            return False
        self._end(batch, failures)
        self._settle_landed()
        return True

    def take_failure(self, key: ExpertKey) -> Exception | None:
        """Return why `key` could not be read, once."""
        return self._failed.pop(key, None)

    def join(self, key: ExpertKey, entry: Entry, low: bool) -> None:
        """Lock what has a slot: a guess becomes a demand, too little a head gets its rest."""
        self._failed.pop(key, None)  # of a lease that ended before its read did
        if entry.guessed and not entry.used:
            self.telemetry.guesses_used += 1
        entry.locks += 1
        if entry.resident and entry.part is Part.WHOLE:
            return
        self._queue.promote(key)
        self.filler.promote(key)
        if entry.part is Part.HEAD and not low:
            if entry.resident:
                self.table.upgrade(entry)
                self._demand(entry)
            elif key in self._queue:
                head_bytes = self._parts.bytes(entry)
                entry.part = Part.WHOLE
                self.telemetry.bytes_speculated += self._parts.bytes(entry) - head_bytes
            else:
                entry.then_rest = True

    def abandon(self, entry: Entry) -> None:
        """End a lease on an expert that was not computed; an unstarted read is withdrawn."""
        if (self._queue.withdraw(entry.key) or self.filler.withdraw(entry.key)) is None:
            entry.then_rest = False
            self.table.unlock(entry)
        elif entry.guessed and entry.part is not Part.REST:
            self.telemetry.guesses_used -= 1
            self._take_back_guess(entry)
        else:
            self.telemetry.bytes_demand -= self._parts.bytes(entry)
            entry.locks -= 1
            self.table.give_back(entry)

    def _demand(self, entry: Entry) -> None:
        self._queue.push_demand(entry)
        self.telemetry.bytes_demand += self._parts.bytes(entry)
        if not (self._reads_here() or self.filler.takes(self.turns.phase)):
            self._readers.wake()

    def _guess(self, entry: Entry) -> None:
        self._queue.push_guess(entry)
        self.telemetry.guesses += 1
        self.telemetry.bytes_speculated += self._parts.bytes(entry)
        self._wishes.spend()
        if not self.filler.takes(self.turns.phase):
            self._readers.wake()

    def _cancel(self, unwanted: Callable[[ExpertKey], bool]) -> list[Entry]:
        """Take back the guesses that are `unwanted` and have not begun."""
        under_way = self.filler.under_way.items()
        started = [key for key, entry in under_way if not entry.used and unwanted(key)]
        found = [self.filler.withdraw(key) for key in started]
        return self._queue.cancel(unwanted) + [entry for entry in found if entry is not None]

    def _take_back_guesses(self, prediction: Prediction) -> None:
        """Drop what is queued and wished for a layer but not named by a later guess for it."""
        layer, named = prediction.layer, set(prediction.ranked)
        for stale in self._cancel(lambda key: key.layer == layer and key.expert not in named):
            self._take_back_guess(stale)
            self._wishes.give_back()
        self._wishes.clear()

    def _take_back_guess(self, entry: Entry) -> None:
        self.telemetry.guesses -= 1
        self.telemetry.bytes_speculated -= self._parts.bytes(entry)
        self.table.give_back(entry)

    def _start_anew(self) -> None:
        self._queue = ReadQueue(self._parts.bytes)
        self.filler.forget()
        while self._readers.reading and self._changed.wait(POLL_S):
            pass  # slots of the old table are still being filled
        self.filler.slots.used(range(self.table.slots))  # by what was told to read them
        self.link.forget()  # the torn section may have left reads of its own uncounted
        fresh = self.table.emptied()
        fresh.evictions, self.table = self.table.evictions, fresh
        self.table.on_drop = self._count_waste
        self._failed.clear()
        self.section.torn = False

    def _count(self, choice: Choice, keys: Sequence[ExpertKey]) -> None:
        counts = self.telemetry.counts[choice.phase][choice.layer]
        self.table.count(keys, counts, choice.low)
        prediction = self._predictions.pop(choice.layer, None)
        self._predictions.clear()  # of a step that failed on the way
        if prediction is not None:
            counts.add_guess(prediction, choice.experts)
            if choice.phase is Phase.DECODE:
                self._wishes.sureness.learn(prediction, choice, self.table.waits_for)

    def _count_waste(self, entry: Entry) -> None:
        if entry.guessed and not entry.used and entry.resident:
            self.telemetry.bytes_wasted += self._parts.bytes(entry)

    def _reads_here(self) -> bool:
        # In prefill computing one expert takes longer than reading the next.
        return self.filler.are_small and self.turns.phase is Phase.DECODE

    def _take_batch(self) -> list[Entry]:
        batch = self._queue.take(self.filler.batch_bytes)
        self._begin(batch)
        if self._queue:
            self._readers.wake()
        return batch

    def _begin(self, batch: Sequence[Entry]) -> None:
        self.link.begin(time.perf_counter(), len(batch))

    def _end(self, batch: Sequence[Entry], failures: Sequence[Exception | None]) -> None:
        now = time.perf_counter()
        for entry, failure in zip(batch, failures, strict=True):
            self.link.end(now, 0 if failure else self._parts.bytes(entry))
            self._settle(entry, failure)
        self._changed.notify_all()

    def _settle_landed(self) -> None:
        """Take in what came in by itself since the last time."""
        for entry, failure in self.filler.landed():
            self._settle(entry, failure)

    def _settle(self, entry: Entry, failure: Exception | None) -> None:
        if self.table.get(entry.key) is not entry:
            return  # the table was started anew meanwhile
        if failure is None:
            self.table.landed(entry)
            if entry.then_rest:
                entry.then_rest = False
                self.table.upgrade(entry)
                self._demand(entry)
                self.start_reads()
            return
        self.table.drop(entry)
        if entry.used or not entry.guessed:
            self._failed[entry.key] = failure
