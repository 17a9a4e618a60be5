"""The plan is arithmetic that never exceeds the budget."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fate_moe import budget
from fate_moe.budget import Demands, available_bytes, make_plan
from fate_moe.config import Limits, Size
from fate_moe.errors import BudgetError

MIB = 2**20


def demands(**changes: int) -> Demands:
    sizes = {
        "base_bytes": 300 * MIB,
        "weights_bytes": 400 * MIB,
        "load_bytes": 10 * MIB,
        "kv_bytes": 50 * MIB,
        "workspace_bytes": 30 * MIB,
        "chunk_tokens": 512,
        "slot_bytes": MIB,
        "num_experts": 100,
        "floor_slots": 3,
    }
    return Demands(**{**sizes, **changes})


def ram(mib: int) -> Limits:
    return Limits(ram=Size(count_bytes=mib * MIB))


def test_what_is_left_buys_slots() -> None:
    plan = make_plan(ram(820), demands(), 2**40)
    assert plan.slots == 40
    assert plan.arena_bytes == 40 * MIB
    assert plan.planned_bytes == 820 * MIB
    assert plan.floor_bytes == 783 * MIB


def test_never_more_slots_than_experts() -> None:
    assert make_plan(ram(9999), demands(), 2**40).slots == 100


def test_no_number_takes_three_quarters_of_what_is_free() -> None:
    plan = make_plan(Limits(), demands(), 1200 * MIB)
    assert plan.budget_bytes == 900 * MIB
    assert plan.slots == 100


def test_a_share_of_the_experts() -> None:
    limits = Limits(ram=Size(count_bytes=2**34), experts=Size(share=0.25))
    assert make_plan(limits, demands(), 2**40).slots == 25


def test_loading_may_be_the_highest_point() -> None:
    plan = make_plan(ram(1200), demands(load_bytes=400 * MIB), 2**40)
    assert plan.planned_bytes == 1100 * MIB
    with pytest.raises(BudgetError, match="loading 400.0 MiB"):
        make_plan(ram(1099), demands(load_bytes=400 * MIB), 2**40)


def test_below_the_floor_names_the_floor() -> None:
    with pytest.raises(BudgetError, match="have 782.0 MiB, need at least 783.0 MiB") as error:
        make_plan(ram(782), demands(), 2**40)
    assert "try --ram 783MiB" in str(error.value)
    assert error.value.floor_bytes == 783 * MIB
    assert make_plan(ram(783), demands(), 2**40).slots == 3


def test_too_few_and_too_many_slots_are_refused() -> None:
    wide = Size(count_bytes=2**34)
    with pytest.raises(BudgetError, match="experts: have 2 slots, need at least 3"):
        make_plan(Limits(ram=wide, experts=Size(share=0.02)), demands(), 2**40)
    tight = Limits(ram=Size(count_bytes=800 * MIB), experts=Size(share=0.5))
    with pytest.raises(BudgetError, match="experts: 50 slots need 830.0 MiB, have 800.0 MiB"):
        make_plan(tight, demands(), 2**40)


@given(
    budget_mib=st.integers(1, 4000),
    slot=st.integers(1, 50),
    load=st.integers(0, 500),
    experts=st.integers(3, 3000),
)
def test_the_plan_never_exceeds_the_budget(
    budget_mib: int, slot: int, load: int, experts: int
) -> None:
    need = demands(slot_bytes=slot * MIB, load_bytes=load * MIB, num_experts=experts)
    try:
        plan = make_plan(ram(budget_mib), need, 2**50)
    except BudgetError as error:
        assert error.floor_bytes > budget_mib * MIB
        return
    assert plan.planned_bytes <= plan.budget_bytes == budget_mib * MIB
    assert need.floor_slots <= plan.slots <= experts
    one_more = plan.planned_bytes + need.slot_bytes > plan.budget_bytes
    assert plan.slots == experts or one_more or load > 0


@pytest.mark.parametrize(
    ("line", "name"), [("0::/a/b", "memory.max"), ("4:memory:/a/b", "memory.limit_in_bytes")]
)
def test_the_tightest_cgroup_limits_what_is_available(
    line: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "cgroup"
    own.write_text(f"3:cpu:/elsewhere\n{line}\n")
    controller = line.split(":")[1]
    monkeypatch.setattr(budget, "_OWN_CGROUPS", own)
    monkeypatch.setattr(budget, "_CGROUP_ROOTS", {controller: (tmp_path, name)})
    assert available_bytes(100, 900) == 1000
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / name).write_text("max\n")
    assert available_bytes(100, 900) == 1000
    (tmp_path / "a" / name).write_text("600\n")
    assert available_bytes(100, 900) == 600
    (tmp_path / "a" / "b" / name).write_text("400\n")
    assert available_bytes(100, 900) == 400


def test_advice_can_be_followed() -> None:
    tight = Limits(ram=Size(count_bytes=800 * MIB), experts=Size(share=0.5))
    with pytest.raises(BudgetError) as error:
        make_plan(tight, demands(slot_bytes=4096, num_experts=100_000), 2**40)
    advised = str(error.value).split("--experts ")[1].split("KiB")[0]
    limits = Limits(ram=tight.ram, experts=Size(count_bytes=int(advised) * 1024))
    assert make_plan(limits, demands(slot_bytes=4096, num_experts=100_000), 2**40).slots == 5120
