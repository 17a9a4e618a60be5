"""`fate bench policies`: which policy is how fast, over budgets and links?"""

from __future__ import annotations

from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fate_moe.cli import options
from fate_moe.cli.bench import WHAT, JsonOut, bench_app, left_out_rows, open_out
from fate_moe.cli.terminal import (
    TerminalProgress,
    default_cache_dir,
    emit_json,
    guarded,
    show_report,
    show_table,
    tell,
)
from fate_moe.cli.trace import read_prompts
from fate_moe.config import parse_size
from fate_moe.errors import ConfigError

if TYPE_CHECKING:
    from fate_moe.bench.policies import Form, Row

_OWN = "chat"
_OWN_PROMPTS = (
    "Explain why the sky is blue and the sunset is red, to a child who asks about everything.",
    "A farmer has 17 sheep. All but nine run away, and then he buys twice as many as he has left. "
    "How many sheep does he have? Think step by step.",
    "Write a function that returns the longest word of a sentence, and three tests for it.",
    "Write a short letter to a friend who has moved to another city.",
)  # fmt: skip

PolicyList = Annotated[
    str,
    typer.Option(
        "--policies", metavar="LIST", rich_help_panel=WHAT,
        help="Policies, in turns; tuned+cache=arc is one with a setting changed (predictor, cache, "
        "allocation, shallow_layers, percentile, window, int2_share, int2_on_miss, routing_bias), "
        "resident has all experts in memory, and ablation stands for the default one without each "
        "of its parts.",
    ),
]  # fmt: skip
Budgets = Annotated[
    str,
    typer.Option("--experts", metavar="LIST", rich_help_panel=WHAT,
                 help="Shares of all experts that have a slot."),
]  # fmt: skip
Links = Annotated[
    str,
    typer.Option(
        "--link", metavar="LIST", rich_help_panel=WHAT,
        help="Bytes per second from disk, such as none,200MB,1GB; none: the disk as it is. Slower "
        "ones are made by waiting.",
    ),
]  # fmt: skip
Rounds = Annotated[
    int, typer.Option(metavar="N", min=1, max=1000, rich_help_panel=WHAT, help="Runs of all.")
]
PromptTokens = Annotated[
    int,
    typer.Option("--prompt", metavar="N", min=2, max=32768, rich_help_panel=WHAT,
                 help="Tokens to read of each prompt, which is cut, or joined with others."),
]  # fmt: skip
NewTokens = Annotated[
    int,
    typer.Option("--tokens", metavar="N", min=1, max=4096, rich_help_panel=WHAT,
                 help="Tokens to write after each."),
]  # fmt: skip
WarmUps = Annotated[
    int,
    typer.Option(metavar="N", min=0, max=1000, rich_help_panel=WHAT,
                 help="First prompts that do not count."),
]  # fmt: skip
PromptFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--prompts", metavar="FILE", rich_help_panel=WHAT,
        help="A prompt a line: plain text, or JSON objects with a field prompt, question, query or "
        "context; chat: a few of Fate's own, the default. May be given several times: the first "
        "of each, the second of each, and so on.",
    ),
]  # fmt: skip
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit", metavar="N", min=1, rich_help_panel=WHAT,
        help="Only N prompts of each file; those that are too short go on with its other ones.",
    ),
]  # fmt: skip
Out = Annotated[
    Path,
    typer.Option(
        metavar="DIR", help="Receives rows.jsonl (a line for each run), table.md and plot.png."
    ),
]


@bench_app.command("policies")
@guarded
def policies(
    model: options.Model = "smolmoe",
    names: PolicyList = "demand,path,fate,tuned",
    budgets: Budgets = "25%,50%,75%",
    links: Links = "none",
    prompts: PromptFiles = None,
    limit: Limit = None,
    prompt_tokens: PromptTokens = 128,
    new_tokens: NewTokens = 64,
    warm_ups: WarmUps = 1,
    rounds: Rounds = 3,
    threads: options.Threads = None,
    compute: options.Compute = None,
    vram: options.Vram = None,
    ram: options.Ram = None,
    cache_dir: options.CacheDir = None,
    out: Out = Path("fate-policies"),
    json_out: JsonOut = False,
) -> None:
    """Measure policies against each other on the same prompts, in turns.

    Each prompt is answered by all policies before the next one is, so their ratio on it hardly
    depends on what else the machine does; shown is the median of these. Beside them a bound, for
    links with a rate: everything resident, or the fewest bytes that any cache and any prediction
    need, over the link. Leave the machine alone meanwhile.

    Examples:

        fate bench policies --link none,200MB

        fate bench policies --prompts gsm8k.jsonl --prompts chat --limit 3 --prompt 256

        fate bench policies --policies ablation --link 200MB --experts 50%

        fate bench policies --policies resident,demand,tuned --experts 50%,75%

        fate bench policies ./my-store --policies demand,tuned --experts 10%,30%,50%,70%,90%
    """
    form = _form(names, budgets, links, rounds, prompt_tokens, new_tokens, warm_ups)
    form = _with(form, threads=threads, compute=compute, vram=vram, ram=ram)
    files = [_texts(name) for name in prompts or [_OWN]]
    with TerminalProgress() as progress, open_out(out) as lines:
        from fate_moe.bench.policies import requests_of, run_policies
        from fate_moe.engine.prepare import find_store

        store = find_store(model, cache_dir=cache_dir or default_cache_dir(), progress=progress)
        sets = [requests_of(store, texts, form, limit) for texts in files]
        requests = [one for ones in zip_longest(*sets) for one in ones if one is not None]
        rows = run_policies(store, requests, form, lines, _tell, progress, note=tell)
    _show(rows, out, f"{store.name}: {form.prompt_tokens} tokens read, {new_tokens} written",
          json_out)  # fmt: skip


def _texts(name: str) -> list[str]:
    return list(_OWN_PROMPTS) if name == _OWN else read_prompts(Path(name), None)


def _form(
    names: str,
    budgets: str,
    links: str,
    rounds: int,
    prompt_tokens: int,
    new_tokens: int,
    warm_ups: int,
) -> Form:
    from fate_moe.bench.policies import ABLATION, Form, parse_policy

    chosen = list(ABLATION) if names == "ablation" else options.parts_of(names, "policies")
    for name in chosen:
        parse_policy(name)
    return Form(
        policies=tuple(chosen),
        budgets=tuple(_share(part) for part in options.parts_of(budgets, "experts")),
        links=tuple(_link(part) for part in options.parts_of(links, "link")),
        rounds=rounds,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        warm_ups=warm_ups,
    )


def _with(form: Form, **settings: object) -> Form:
    from dataclasses import replace

    chosen = tuple((name, value) for name, value in settings.items() if value is not None)
    return replace(form, settings=chosen)


def _share(text: str) -> float:
    share = parse_size(text, "experts").share
    if not share or share >= 1:
        raise ConfigError(f"experts: {text!r:.40}: need a share below 100%, such as 25%")
    return share


def _link(text: str) -> float | None:
    if text == "none":
        return None
    size = parse_size(text.removesuffix("/s"), "link").count_bytes
    if size is None or size < 2**20:
        raise ConfigError(f"link: {text!r:.40}: need none, or bytes per second such as 200MB")
    return float(size)


def _tell(row: Row) -> None:
    from fate_moe.bench.policies_present import link_text

    when = "computed" if row.round == 0 else f"round {row.round}"
    tell(
        f"{when}, link {link_text(row.link_bytes_s)}, {100 * row.budget:g} % of the experts: "
        f"{row.policy} {row.decode_tok_s:.2f} tok/s"
    )


def _show(rows: list[Row], out: Path, title: str, json_out: bool) -> None:
    from fate_moe.bench import policies_present as present

    table = present.markdown(rows)
    try:
        (out / "table.md").write_text(f"# {title}\n\n{table}", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror or error}") from error
    present.plot(rows, out / "plot.png", title)
    if json_out:
        emit_json({"out": str(out), "rows": [asdict(row) for row in rows]})
        return
    left_out = show_table(*present.table(rows), least=present.LEAST, plain=table)
    names = ("rows.jsonl", "table.md", "plot.png")
    written = [("written", " ".join(str(out / name) for name in names))]
    show_report([*left_out_rows(left_out), *written])
