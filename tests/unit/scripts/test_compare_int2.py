"""The comparison of two-bit forms: is each what it is called, and does the table tell the truth?"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fate_moe.bench.compare import Models, compare
from fate_moe.bench.evaluate import Tasks
from fate_moe.quant.codec import decode, decode_int2, encode
from fate_moe.quant.quantize import quantize
from fate_moe.quant.record import MatrixSpec, RecordLayout
from fate_moe.types import no_progress

TEXT = "The lighthouse keeper found a letter in a bottle. It was older than the tower. " * 12


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The script takes one thread; the tests that follow get theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def weight() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, 128, generator=generator) * 0.02


def losses(weight: Tensor, made: Tensor, group: int) -> Tensor:
    return (weight - made).view(-1, group).double().square().sum(1)


@pytest.mark.parametrize("group", [32, 64])
def test_what_ships_is_the_head_of_a_record(weight: Tensor, group: int) -> None:
    import int2_forms

    layout = RecordLayout((MatrixSpec("up", 64, 128, group),))
    record = encode(layout, {"up": weight})
    two, four = (view(layout, record, torch.float32)["up"] for view in (decode_int2, decode))
    assert torch.equal(int2_forms.rebuild("ships", weight, group), two)
    assert torch.equal(int2_forms.rebuild("int4", weight, group), four)
    assert 8 * layout.head_bytes == int2_forms.bits_read("ships", group) * weight.numel()
    whole_bytes = layout.head_bytes + layout.matrices[0].plane_bytes
    assert 8 * whole_bytes == int2_forms.bits_read("int4", group) * weight.numel()


@pytest.mark.parametrize("group", [16, 32, 64])
@pytest.mark.parametrize("form", ["ships", "factor", "own"])
def test_nested_forms_know_the_high_plane_alone(weight: Tensor, form: str, group: int) -> None:
    import int2_forms

    high = (quantize(weight, group).codes >> 2).view(-1, group)
    made = int2_forms.rebuild(form, weight, group).view(-1, group)
    for code in range(4):
        same = made.where(high == code, torch.nan)
        first = same.nanmean(1, keepdim=True)
        assert (same - first).nan_to_num().abs().max() < 1e-6
    assert (made.std(1) > 0).all()


@pytest.mark.parametrize("group", [16, 32, 64])
def test_each_freedom_loses_less(weight: Tensor, group: int) -> None:
    import int2_forms

    lost = {
        form: losses(weight, int2_forms.rebuild(form, weight, group), group)
        for form in ("ships", "factor", "own", "independent")
    }
    assert (lost["independent"] <= lost["own"]).all()  # of every group
    totals = [found.sum().item() for found in lost.values()]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == 4


def test_codes_for_both_lose_least_of_the_sum_that_they_are_chosen_for(weight: Tensor) -> None:
    import int2_forms

    share = int2_forms.HEAD_SHARE
    four, two, both_four, both_two = (
        losses(weight, int2_forms.rebuild(form, weight, 64), 64)
        for form in ("int4", "ships", "both-int4", "both")
    )
    assert (both_four + share * both_two <= (four + share * two) * (1 + 1e-6)).all()
    assert both_two.sum() < 0.99 * two.sum()
    assert four.sum() < both_four.sum() < 1.1 * four.sum()


def test_the_heads_share_is_the_callers(weight: Tensor) -> None:
    from compare_int2 import Sums

    two, four = (
        [losses(weight, Sums(share).round(form, "up", weight, 64), 64).sum() for share in (0, 1)]
        for form in ("both", "both-int4")
    )
    assert two[1] < two[0]
    assert four[1] > four[0]


def test_bits_add_up() -> None:
    from int2_forms import bits_added, bits_read

    assert [bits_read("independent", group) for group in (64, 32, 16)] == [2.5, 3.0, 4.0]
    assert bits_added("independent", 64) == 2.5  # a second head
    assert bits_added("own", 64) == 0.5  # a second pair of scale and zero
    assert bits_added("ships", 64) == bits_added("factor", 64) == bits_added("both", 64) == 0


def test_the_table_tells_of_the_experts_that_are_shipped(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import compare_int2

    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    compare_int2.main([
        "--model", str(tiny_checkpoint), "--text", str(text), "--tokens", "128", "--random", "64",
        "--groups", "64", "--forms", "int4", "ships",
    ])  # fmt: skip
    told, _, head, _, *lines = capsys.readouterr().out.splitlines()
    names = [name.strip() for name in head.split("|")[1:-1]]
    four, two = (dict(zip(names, map(str.strip, line.split("|")[1:-1]), strict=True))
                 for line in lines)  # fmt: skip
    # 64 x 64 weights of gate and up in groups of 64, 64 x 32 of down in groups of 32.
    assert float(two["bytes read a weight"]) == pytest.approx((2.5 * 2 + 3.0) / 3 / 8, abs=1e-4)
    assert float(two["bytes more on disk a weight"]) == 0
    for column in ("error of gate_up_proj", "error of down_proj", "error of random", "KL (nats)"):
        assert 0 < 2 * float(four[column]) < float(two[column])
    asked = Tasks(TEXT, 128, 128)
    # The native core rounds activations; the oracle computes with what was rebuilt alone.
    models = Models(str(tiny_checkpoint), tmp_path / "cache", settings={"compute": "eager"})
    found = compare(models, ["int4", "int2"], asked, no_progress)
    assert told.endswith(f"{found['original'].perplexity:.2f}")
    for row, name in ((four, "int4"), (two, "int2")):
        assert float(row["perplexity"]) == pytest.approx(found[name].perplexity, rel=1e-5)
        assert float(row["KL (nats)"]) == pytest.approx(found[name].kl, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1"], "tokens: have 1, need at least 2"),
        (["--head-share", "-1"], "head_share: have -1.0, need at least 0"),
        (["--text", "nowhere.txt"], "nowhere.txt: cannot be read"),
        (["--random", "24", "--forms", "int4"], "random: 24 inputs, need a multiple of 16"),
    ],
)
def test_bad_input_gets_one_line(
    tiny_checkpoint: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import compare_int2

    with pytest.raises(SystemExit) as ended:
        compare_int2.main(["--model", str(tiny_checkpoint), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_store_is_refused(tiny_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import compare_int2

    with pytest.raises(SystemExit) as ended:
        compare_int2.main(["--model", str(tiny_store)])
    assert ended.value.code == 2
    assert "a store is rounded already; give its checkpoint" in capsys.readouterr().err
