"""Working stand-ins for slow or failing parts."""

import threading
from collections.abc import Callable

from fate_moe.errors import ReadError
from fate_moe.types import ExpertKey


class FakeReader:
    """Fills records from a formula; reads can be held back, counted and made to fail."""

    def __init__(self) -> None:
        self.reads: list[ExpertKey] = []
        self.fail: Callable[[ExpertKey], bool] = lambda key: False
        self.gate = threading.Event()
        self.gate.set()

    def read_into(
        self, key: ExpertKey, buffer: memoryview, start: int = 0, length: int | None = None
    ) -> None:
        self.gate.wait(10)
        self.reads.append(key)
        if self.fail(key):
            raise ReadError(key, "fake", 4096 * key.expert, 5, "injected")
        buffer[:] = bytes([10 * key.layer + key.expert]) * len(buffer)
