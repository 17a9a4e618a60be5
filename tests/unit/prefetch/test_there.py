"""There is what would cost no read: whole, or on its way so."""

from fate_moe.prefetch.there import There
from fate_moe.types import Phase, Prediction
from tests.unit.prefetch.test_mover_parts import Bench


def test_whole_experts_and_those_on_their_way_are_there_and_heads_are_not() -> None:
    b = Bench(capacities=(6, 6))
    b.use(1, [1, 2, 3], low=[2])
    b.reader.gate.clear()
    b.mover.speculate(Prediction(1, (4,), 1))
    there = There(b.mover, 1, 8)
    assert there.among(range(there.num_experts)) == [1, 3, 4]
    assert there.among([5, 4, 2]) == [4]
    assert There(b.mover, 0, 8).among(range(8)) == []
    b.reader.gate.set()
    there.rerouted(2)
    assert b.mover.telemetry.total(Phase.DECODE).rerouted == 2
    assert b.mover.telemetry.total(layer=0).rerouted == 0
    b.mover.close()
