"""ARC equals the pseudo-code of its paper, request for request."""

from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from fate_moe.cache.arc import ARC
from fate_moe.types import ExpertKey


class Textbook:
    """Figure 4 of Megiddo and Modha (FAST 2003), written down separately as the oracle."""

    def __init__(self, c: int) -> None:
        self.c, self.p = c, 0.0
        self.t1: OrderedDict[int, None] = OrderedDict()
        self.t2: OrderedDict[int, None] = OrderedDict()
        self.b1: OrderedDict[int, None] = OrderedDict()
        self.b2: OrderedDict[int, None] = OrderedDict()

    def replace(self, x: int) -> None:
        if self.t1 and (len(self.t1) > self.p or (x in self.b2 and len(self.t1) == self.p)):
            self.b1[self.t1.popitem(last=False)[0]] = None
        else:
            self.b2[self.t2.popitem(last=False)[0]] = None

    def request(self, x: int) -> bool:
        if x in self.t1 or x in self.t2:
            self.t1.pop(x, None)
            self.t2.pop(x, None)
            self.t2[x] = None
            return True
        if x in self.b1:
            self.p = min(self.c, self.p + max(len(self.b2) / len(self.b1), 1))
            self.replace(x)
            del self.b1[x]
            self.t2[x] = None
        elif x in self.b2:
            self.p = max(0, self.p - max(len(self.b1) / len(self.b2), 1))
            self.replace(x)
            del self.b2[x]
            self.t2[x] = None
        else:
            self.new(x)
        return False

    def new(self, x: int) -> None:
        l1 = len(self.t1) + len(self.b1)
        total = l1 + len(self.t2) + len(self.b2)
        if l1 == self.c:
            if len(self.t1) < self.c:
                self.b1.popitem(last=False)
                self.replace(x)
            else:
                self.t1.popitem(last=False)
        elif total >= self.c:
            if total == 2 * self.c:
                self.b2.popitem(last=False)
            self.replace(x)
        self.t1[x] = None


@given(
    sequence=st.lists(st.integers(0, 11), max_size=300),
    capacity=st.integers(1, 8),
)
def test_equals_the_textbook(sequence: list[int], capacity: int) -> None:
    book, ours = Textbook(capacity), ARC(capacity)
    resident: set[int] = set()
    for expert in sequence:
        key = ExpertKey(0, expert)
        hit = book.request(expert)
        assert hit == (expert in resident)
        if hit:
            ours.hit(key)
        else:
            ours.miss(key)
            if len(resident) == capacity:
                victim = ours.victim(key, lambda _: True)
                assert victim is not None
                ours.evict(victim)
                resident.remove(victim.expert)
            ours.admit(key)
            resident.add(expert)
        assert resident == set(book.t1) | set(book.t2)
        assert ours.target == book.p


def test_one_scan_does_not_push_out_what_is_used_often() -> None:
    arc, resident = ARC(4), set()
    for expert in [0, 1, 0, 1, *range(10, 30), 0, 1]:
        key = ExpertKey(0, expert)
        if expert in resident:
            arc.hit(key)
            continue
        arc.miss(key)
        if len(resident) == 4:
            victim = arc.victim(key, lambda _: True)
            assert victim is not None
            arc.evict(victim)
            resident.remove(victim.expert)
        arc.admit(key)
        resident.add(expert)
    assert {0, 1} <= resident
