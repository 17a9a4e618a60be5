"""Which policy is how fast on the same prompts, over budgets and links?

Everything runs in turns: every round runs each cell once with each policy, one after the other, so
that what else the machine does falls on all. A cell is a budget and a link. Prompts are answered
greedily, so every policy computes the same tokens; the first ones warm the engine up, as in a
server that has been running for a while. Beside them a bound: what nobody can be faster than.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from fate_moe.bench.throttle import ThrottledReader
from fate_moe.cache import make_cache
from fate_moe.cache.allocation import Regions, make_regions
from fate_moe.cache.belady import Belady
from fate_moe.config import PRESETS, make_config, parse_size
from fate_moe.engine.build import build
from fate_moe.engine.demands import chunk_sizes
from fate_moe.engine.handle import Engine
from fate_moe.engine.record import Recorder
from fate_moe.errors import ConfigError
from fate_moe.models.kv_cache import new_cache
from fate_moe.models.load import load_tokenizer
from fate_moe.predict import Known, make_predictor
from fate_moe.sim.guesses import make_guesser
from fate_moe.sim.replay import replay
from fate_moe.sim.sweep import future_of
from fate_moe.sim.trace import Step, Trace
from fate_moe.types import Phase, Progress

BOUND = "bound"
_COMPUTED = 0


ABLATION = (
    "demand", "tuned", "tuned+predictor=cross_layer", "tuned+cache=arc", "tuned+allocation=even",
    "tuned+window=99", "fate",
)  # fmt: skip
"""The default policy, and without each of its parts; a window means that guessing never stops."""


def _share_of(text: str) -> float:
    share = parse_size(text).share
    if share is None:
        raise ValueError(text)
    return share


_CHANGES: dict[str, Callable[[str], object]] = {
    "predictor": str, "cache": str, "allocation": str, "shallow_layers": int, "percentile": float,
    "window": int, "int2_share": _share_of,
}  # fmt: skip


def parse_policy(text: str) -> tuple[str, dict[str, object]]:
    """Read `tuned`, or `tuned+cache=arc+window=9`: a policy, and settings changed in it.

    Raises:
        ConfigError: the policy or a setting is unknown, or a value is none.
    """
    name, *changes = text.split("+")
    if name not in PRESETS or name == "resident":
        known = ", ".join(sorted(set(PRESETS) - {"resident"}))
        raise ConfigError(f"policies: {name!r:.40} is none of {known}")
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
        budgets: shares of all experts that have slots, in (0, 1).
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
        bytes_token: moved for each token written.
        bytes_prompt: moved for each token read.
        stall_share: of the time that computing waited for bytes, of the whole run.
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


class _Spent(NamedTuple):
    """What one request took."""

    read_s: float
    write_s: float
    read_bytes: int
    write_bytes: int


def run_policies(
    store: Path,
    requests: Sequence[Tensor],
    form: Form,
    out: IO[str],
    on_row: Callable[[Row], None],
    progress: Progress,
) -> list[Row]:
    """Measure everything, round by round; the bound first.

    Args:
        requests: prompts, token ids [1, T] each; see `requests_of`.
        out: receives a line for each row.
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

    total = 1 + form.rounds * len(form.budgets) * len(form.links) * len(form.policies)
    progress("measuring policies", 0, total)
    for row in _bounds(store, requests, form):
        take(row)
    done = 1
    for number in range(form.rounds):
        for budget in form.budgets:
            for link in form.links:
                for policy in form.policies:
                    progress("measuring policies", done, total)
                    take(_measure(store, requests, form, policy, budget, link, number + 1))
                    done += 1
    progress("measuring policies", total, total)
    return rows


def requests_of(store: Path, prompts: Sequence[str], form: Form) -> list[Tensor]:
    """Return the token ids of texts, each cut, or repeated, to the form's prompt length.

    Raises:
        ConfigError: one of them is empty.
    """
    tokenizer: Any = load_tokenizer(store)
    requests = []
    for text in prompts:
        ids = tokenizer(text)["input_ids"]
        if not ids:
            raise ConfigError("prompts: one of them is empty")
        whole = ids * -(-form.prompt_tokens // len(ids))
        requests.append(torch.tensor([whole[: form.prompt_tokens]]))
    return requests


def _open(store: Path, form: Form, policy: str, budget: float | None, link: float | None) -> Engine:
    name, changes = (policy, {}) if policy == "resident" else parse_policy(policy)
    context = form.prompt_tokens + form.new_tokens + 8
    settings = {"context_tokens": context, **dict(form.settings), **changes}
    if budget is not None:
        settings["experts"] = f"{100 * budget:g}%"
    config = make_config(name, **settings)
    if link is None:
        return build(store, config)
    return build(store, config, slowed=partial(ThrottledReader, bytes_s=link))


def _measure(
    store: Path,
    requests: Sequence[Tensor],
    form: Form,
    policy: str,
    budget: float,
    link: float | None,
    number: int,
) -> Row:
    engine = _open(store, form, policy, budget, link)
    try:
        for request in requests[: form.warm_ups]:
            _answer(engine, request, form.new_tokens)
        engine.mover.reset()
        spent = [_answer(engine, one, form.new_tokens) for one in requests[form.warm_ups :]]
        report = engine.report()
        counts = engine.mover.telemetry.total(Phase.DECODE)
    finally:
        engine.close()
    whole = _Spent(*(sum(part) for part in zip(*spent, strict=True)))
    tokens, prompt_tokens = len(spent) * form.new_tokens, len(spent) * form.prompt_tokens
    return Row(
        round=number,
        policy=policy,
        budget=budget,
        link_bytes_s=link,
        prefill_tok_s=prompt_tokens / whole.read_s,
        decode_tok_s=tokens / whole.write_s,
        hit_rate=counts.hit_rate,
        late_rate=counts.late / counts.requests if counts.requests else None,
        recall=counts.recall,
        bytes_token=whole.write_bytes / tokens,
        stall_share=report.stall_s / (whole.read_s + whole.write_s),
        guessing=report.guessing,
        bytes_prompt=whole.read_bytes / prompt_tokens,
    )


@torch.no_grad()
def _answer(engine: Engine, ids: Tensor, new_tokens: int) -> _Spent:
    """Read a prompt and write greedily."""
    model: Any = engine.model
    cache, moved = new_cache(model), engine.mover.telemetry
    began_s, began = time.perf_counter(), moved.bytes_demand + moved.bytes_speculated
    ids = ids.to(engine.blueprint.device)
    for piece in torch.split(ids, chunk_sizes(ids.shape[1], engine.chunk_tokens), dim=1):
        logits = model(
            input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
    logits.flatten()[:1].tolist()  # a GPU is done, too
    read_s, read = time.perf_counter(), moved.bytes_demand + moved.bytes_speculated
    for _ in range(new_tokens):
        token = logits[:, -1:].argmax(dim=-1)
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
    logits.flatten()[:1].tolist()
    end_s, end = time.perf_counter(), moved.bytes_demand + moved.bytes_speculated
    return _Spent(read_s - began_s, end_s - read_s, read - began, end - read)


def _bounds(store: Path, requests: Sequence[Tensor], form: Form) -> Iterator[Row]:
    """Compute the bound of each cell: everything resident, or the fewest bytes over the link.

    The fewest bytes are Belady's, with all slots in one region and every need known ahead.
    """
    engine = _open(store, form, "resident", None, None)
    try:
        with Recorder(engine) as recorder:
            for request in requests:
                _answer(engine, request, form.new_tokens)
        trace = recorder.trace
        counted = requests[form.warm_ups :]
        decode_s = sum(_answer(engine, one, form.new_tokens).write_s for one in counted)
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
