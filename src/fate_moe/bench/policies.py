"""Which policy is how fast on the same prompts, over budgets and links?

Prompts are answered in turns: in a cell, which is a budget and a link, the engines of all policies
are open at once; each reads the prompt, one after the other, and then each writes a few tokens, so
that what else the machine does in those seconds falls on all and cancels in a prompt's ratio of two
policies. Where memory has no room for all, each answers all prompts alone. Answers are greedy, so
every policy computes the same tokens; the first prompts warm the engines up, as in a server that
has been running for a while. Beside them a bound: what nobody can be faster than.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from fate_moe.bench.answers import Spent, answer, answer_in_turns
from fate_moe.bench.throttle import ThrottledReader
from fate_moe.cache import make_cache
from fate_moe.cache.allocation import Regions, make_regions
from fate_moe.cache.belady import Belady
from fate_moe.config import PRESETS, Config, format_bytes, make_config, parse_size
from fate_moe.engine.build import build
from fate_moe.engine.handle import Engine
from fate_moe.engine.plan import draw
from fate_moe.engine.record import Recorder
from fate_moe.errors import ConfigError
from fate_moe.models.load import load_tokenizer
from fate_moe.predict import Known, make_predictor
from fate_moe.sim.guesses import make_guesser
from fate_moe.sim.replay import replay
from fate_moe.sim.sweep import future_of
from fate_moe.sim.trace import Step, Trace
from fate_moe.types import Phase, Progress

BOUND = "bound"
RESIDENT = "resident"
_COMPUTED = 0

ABLATION = (
    "demand", "tuned", "tuned+predictor=cross_layer", "tuned+cache=arc",
    "tuned+allocation=shallow", "tuned+window=99", "fate",
)  # fmt: skip
"""The default policy, and without each of its parts; a window means that guessing never stops."""


def _share_of(text: str) -> float:
    share = parse_size(text).share
    if share is None:
        raise ValueError(text)
    return share


_CHANGES: dict[str, Callable[[str], object]] = {
    "predictor": str, "cache": str, "allocation": str, "shallow_layers": int, "percentile": float,
    "window": int, "int2_share": _share_of, "int2_on_miss": _share_of, "routing_bias": float,
}  # fmt: skip


def parse_policy(text: str) -> tuple[str, dict[str, object]]:
    """Read `tuned`, or `tuned+cache=arc+window=9`: a policy, and settings changed in it.

    Raises:
        ConfigError: the policy or a setting is unknown, or a value is none.
    """
    name, *changes = text.split("+")
    if name not in PRESETS:
        raise ConfigError(f"policies: {name!r:.40} is none of {', '.join(sorted(PRESETS))}")
    if name == RESIDENT and changes:
        raise ConfigError("policies: resident moves nothing, so there is nothing to change in it")
    settings: dict[str, object] = {}
    for change in changes:
        key, _, value = change.partition("=")
        try:
            settings[key] = _CHANGES[key](value)
        except (KeyError, ValueError, ConfigError):
            raise ConfigError(
                f"policies: {change!r:.40} changes none of {', '.join(_CHANGES)}; write "
                "tuned+cache=arc"
            ) from None
    if "int2_share" in settings:
        settings["int2"] = "tail"
    config = make_config(name, **settings)
    make_predictor(config.predict, Known())
    make_cache(config.cache.cache, 1)
    make_regions(config.cache.allocation, [], 0, 0)
    return name, settings


@dataclass(frozen=True, slots=True)
class Form:
    """What is measured.

    Attributes:
        policies: as for `parse_policy`.
        budgets: shares of all experts that have slots, in (0, 1); of `resident` all have one.
        links: bytes per second; None: the disk as it is.
        rounds: runs of each cell with each policy.
        prompt_tokens, new_tokens: of each request.
        warm_ups: requests before those that count.
        settings: further settings of `make_config`.
        raw_bytes_s: what the link does where no rate is set, if it was measured: for the bound.
    """

    policies: tuple[str, ...]
    budgets: tuple[float, ...]
    links: tuple[float | None, ...]
    rounds: int
    prompt_tokens: int
    new_tokens: int
    warm_ups: int
    settings: tuple[tuple[str, object], ...] = ()
    raw_bytes_s: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One policy in one cell; counts are of decoding alone.

    Attributes:
        round: from 1; 0 for the bound, which is computed.
        decode_tok_s: over all prompts that count.
        bytes_token: moved for each token written.
        bytes_prompt: moved for each token read.
        stall_share: of the time that computing waited for bytes, of the whole run.
        decode_each: tokens per second of each prompt that counts; empty for the bound.
        in_turns: whether each prompt was answered by all policies before the next one was.
    """

    round: int
    policy: str
    budget: float
    link_bytes_s: float | None
    prefill_tok_s: float | None
    decode_tok_s: float
    hit_rate: float | None
    late_rate: float | None
    recall: float | None
    bytes_token: float
    stall_share: float | None
    guessing: str = ""
    bytes_prompt: float | None = None
    decode_each: tuple[float, ...] = ()
    in_turns: bool = False


class _Run(NamedTuple):
    """One round of one cell, with the policies that are open at once."""

    number: int
    budget: float
    link: float | None
    names: tuple[str, ...]


def run_policies(
    store: Path,
    requests: Sequence[Tensor],
    form: Form,
    out: IO[str],
    on_row: Callable[[Row], None],
    progress: Progress,
    note: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Measure everything, round by round; the bound first.

    Args:
        requests: prompts, token ids [1, T] each; see `requests_of`.
        out: receives a line for each row.
        note: told, a line for each budget, where policies cannot be open at once.
    Raises:
        ConfigError: too few prompts; FateError: as `build`.
    """
    if len(requests) <= form.warm_ups:
        raise ConfigError(
            f"prompts: {len(requests)}, of which {form.warm_ups} warm up; need one more at least"
        )
    rows: list[Row] = []

    def take(row: Row) -> None:
        rows.append(row)
        out.write(json.dumps(asdict(row)) + "\n")
        out.flush()
        on_row(row)

    total = form.rounds * len(form.budgets) * len(form.links) * len(form.policies) * len(requests)
    done = count(1)
    progress("measuring policies", 0, total)
    for row in _bounds(store, requests, form):
        take(row)

    def answered() -> None:
        progress("measuring policies", next(done), total)

    groups = {budget: _groups(store, form, budget, note) for budget in form.budgets}
    for number in range(form.rounds):
        for budget in form.budgets:
            for link in form.links:
                for names in groups[budget]:
                    run = _Run(number + 1, budget, link, names)
                    for row in _measure(store, requests, form, run, answered):
                        take(row)
    return rows


def requests_of(
    store: Path, prompts: Sequence[str], form: Form, most: int | None = None
) -> list[Tensor]:
    """Return the token ids of texts, each cut, or joined with others, to the form's prompt length.

    Of n requests the first is made of texts 1, n + 1, 2 n + 1 and so on, so that none holds what
    another does while there are enough; after the last text the first ones come again.

    Args:
        most: requests; None: as many as texts, each joined with itself.
    Raises:
        ConfigError: one of them is empty.
    """
    tokenizer: Any = load_tokenizer(store)
    step = min(most or len(prompts), len(prompts))
    requests = []
    for first in range(step):
        ids: list[int] = tokenizer(prompts[first])["input_ids"]
        place = first
        while ids and len(ids) < form.prompt_tokens:
            place = (place + step) % len(prompts)
            ids = ids + tokenizer("\n\n" + prompts[place], add_special_tokens=False)["input_ids"]
        if not ids:
            raise ConfigError("prompts: one of them is empty")
        requests.append(torch.tensor([ids[: form.prompt_tokens]]))
    return requests


def _groups(
    store: Path, form: Form, budget: float, note: Callable[[str], None]
) -> list[tuple[str, ...]]:
    """Say which policies are open at once: all, or each alone where their plans do not fit."""
    drawn = [draw(store, _config(form, policy, budget)) for policy in form.policies]
    for what, plans in (
        ("ram", [one.host or one.memory for one in drawn]),
        ("vram", [one.memory for one in drawn if one.card]),
    ):
        # Of the process itself there is one, whoever is open in it.
        own = min((plan.demands.base_bytes for plan in plans), default=0)
        need = own + sum(plan.planned_bytes - plan.demands.base_bytes for plan in plans)
        have = min((plan.budget_bytes for plan in plans), default=0)
        if need > have and len(plans) > 1:
            note(
                f"{what}: {len(plans)} policies with {100 * budget:g} % of the experts need "
                f"{format_bytes(need)} at once, have {format_bytes(have)}: each answers all "
                "prompts alone, so drift of the machine is in their ratios"
            )
            return [(policy,) for policy in form.policies]
    return [form.policies]


def _config(form: Form, policy: str, budget: float | None) -> Config:
    name, changes = parse_policy(policy)
    context = form.prompt_tokens + form.new_tokens + 8
    settings = {"context_tokens": context, **dict(form.settings), **changes}
    if budget is not None and name != RESIDENT:
        settings["experts"] = f"{100 * budget:g}%"
    return make_config(name, **settings)


def _open(store: Path, form: Form, policy: str, budget: float | None, link: float | None) -> Engine:
    config = _config(form, policy, budget)
    if link is None:
        return build(store, config)
    return build(store, config, slowed=partial(ThrottledReader, bytes_s=link))


def _measure(
    store: Path,
    requests: Sequence[Tensor],
    form: Form,
    run: _Run,
    answered: Callable[[], None],
) -> list[Row]:
    """Answer each prompt with every policy, in turns; who begins changes by prompt."""
    engines: dict[str, Engine] = {}
    spent: dict[str, list[Spent]] = {name: [] for name in run.names}
    with ExitStack() as opened:
        for name in run.names:
            engines[name] = _open(store, form, name, run.budget, run.link)
            opened.callback(engines[name].close)
        for place, request in enumerate(requests):
            if place == form.warm_ups:
                for engine in engines.values():
                    engine.reset()
            first = (run.number - 1 + place) % len(run.names)
            order = (*run.names[first:], *run.names[:first])
            took = answer_in_turns([engines[name] for name in order], request, form.new_tokens)
            for name, one in zip(order, took, strict=True):
                spent[name].append(one)
                answered()
        counted = slice(form.warm_ups, None)
        return [_row(engines[name], name, spent[name][counted], form, run) for name in run.names]


def _row(engine: Engine, policy: str, spent: Sequence[Spent], form: Form, run: _Run) -> Row:
    whole = Spent.of(spent)
    tokens, prompt_tokens = len(spent) * form.new_tokens, len(spent) * form.prompt_tokens
    report, counts = engine.report(), engine.mover.telemetry.total(Phase.DECODE)
    return Row(
        round=run.number,
        policy=policy,
        budget=run.budget,
        link_bytes_s=run.link,
        prefill_tok_s=prompt_tokens / whole.read_s,
        decode_tok_s=tokens / whole.write_s,
        hit_rate=counts.hit_rate,
        late_rate=counts.late / counts.requests if counts.requests else None,
        recall=counts.recall,
        bytes_token=whole.write_bytes / tokens,
        stall_share=report.stall_s / (whole.read_s + whole.write_s),
        guessing=report.guessing,
        bytes_prompt=whole.read_bytes / prompt_tokens,
        decode_each=tuple(form.new_tokens / one.write_s for one in spent),
        in_turns=run.names == form.policies,
    )


def _bounds(store: Path, requests: Sequence[Tensor], form: Form) -> Iterator[Row]:
    """Compute the bound of each cell: everything resident, or the fewest bytes over the link.

    The fewest bytes are Belady's, with all slots in one region and every need known ahead.
    """
    engine = _open(store, form, RESIDENT, None, None)
    try:
        with Recorder(engine) as recorder:
            for request in requests:
                answer(engine, request, form.new_tokens)
        trace = recorder.trace
        counted = requests[form.warm_ups :]
        decode_s = sum(answer(engine, one, form.new_tokens).write_s for one in counted)
    finally:
        engine.close()
    token_s = decode_s / (len(counted) * form.new_tokens)
    steps = [step for step in trace.steps if step.phase is Phase.DECODE]
    for budget in form.budgets:
        moved = _fewest_bytes(trace, steps, budget) / len(steps)
        for link in form.links:
            bytes_s = form.raw_bytes_s if link is None else link
            if bytes_s is not None:
                rate = 1 / max(token_s, moved / bytes_s)
                yield Row(_COMPUTED, BOUND, budget, link, None, rate, None, None, None, moved, None)


def _fewest_bytes(trace: Trace, steps: Sequence[Step], budget: float) -> int:
    decoding = Trace(
        trace.model, trace.experts, trace.top_k, steps, trace.record_bytes, trace.predictor
    )
    slots = int(budget * sum(trace.experts))
    found = replay(
        decoding,
        Regions((slots,), (0,) * len(trace.experts)),
        partial(Belady, future=future_of(decoding)),
        make_guesser("none", decoding),
        decoding.record_bytes or (),
        leases=True,
    )
    return found.bytes_demand
