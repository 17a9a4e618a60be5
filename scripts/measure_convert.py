"""How fast, and in how much memory, is a checkpoint larger than memory converted?

    python scripts/measure_convert.py --out docs/measurements.md

Makes a checkpoint in the shape of Qwen1.5-MoE-A2.7B (28.7 GB; `--layers 14` makes 17.2 GB) from one
block of random weights, converts it in a child process inside a memory cgroup (Linux, root), and
compares the time with what the disk and the quantizer can do. Both are measured in the same run,
again and again while the conversion is held: what else the machine does comes and goes. Needs free
disk for the checkpoint and a third of it; what it made goes when it ends.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from measure import fill, processor

from fate_moe.bench.cgroup import group_folder, limited, unavailable
from fate_moe.config import format_bytes, parse_size
from fate_moe.models.checkpoint import open_checkpoint
from fate_moe.quant.codec import encode
from fate_moe.store.header import build_header, tensor_bytes
from fate_moe.store.ordered import default_jobs, in_order
from fate_moe.store.space import check_space
from fate_moe.store.verify import verify
from fate_moe.types import ExpertKey

BLOCK_BYTES = 64 << 20  # of random weights, repeated; no multiple of an expert, so experts differ
SHARD_BYTES = 4 << 30
PIECE_BYTES = 8 << 20
READ_BYTES = 1 << 29
SAMPLE_S = 40.0  # between two samples of the rates
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a qwen2_moe; by default those of Qwen1.5-MoE-A2.7B."""

    layers: int = 24
    experts: int = 60
    top_k: int = 4
    hidden: int = 2048
    expert_width: int = 1408
    shared_width: int = 5632
    vocabulary: int = 151936
    heads: int = 16

    @property
    def expert_weights(self) -> int:
        """Weights of one routed expert."""
        return 3 * self.hidden * self.expert_width

    def config(self) -> dict[str, object]:
        """The config.json."""
        return {
            "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe",
            "hidden_size": self.hidden, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.heads,
            "intermediate_size": self.shared_width, "moe_intermediate_size": self.expert_width,
            "shared_expert_intermediate_size": self.shared_width, "num_experts": self.experts,
            "num_experts_per_tok": self.top_k, "vocab_size": self.vocabulary,
            "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
            "tie_word_embeddings": False,
        }  # fmt: skip

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order they are written."""
        wide = (self.hidden, self.hidden)
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            path = f"model.layers.{layer}"
            for part in "qkv":
                yield f"{path}.self_attn.{part}_proj.weight", wide
                yield f"{path}.self_attn.{part}_proj.bias", (self.hidden,)
            yield f"{path}.self_attn.o_proj.weight", wide
            yield f"{path}.input_layernorm.weight", (self.hidden,)
            yield f"{path}.post_attention_layernorm.weight", (self.hidden,)
            yield f"{path}.mlp.gate.weight", (self.experts, self.hidden)
            yield f"{path}.mlp.shared_expert_gate.weight", (1, self.hidden)
            yield from self._feed_forward(f"{path}.mlp.shared_expert", self.shared_width)
            for expert in range(self.experts):
                yield from self._feed_forward(f"{path}.mlp.experts.{expert}", self.expert_width)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    def _feed_forward(self, path: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{path}.gate_proj.weight", (width, self.hidden)
        yield f"{path}.up_proj.weight", (width, self.hidden)
        yield f"{path}.down_proj.weight", (self.hidden, width)


@dataclass(frozen=True, slots=True)
class Peaks:
    """Most memory seen; bytes. `group` counts the page cache, too; None without a cgroup."""

    process: int = 0
    group: int | None = None


def make_checkpoint(shape: Shape, folder: Path) -> int:
    """Write config, shards and index; return the bytes of all tensors."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape.config()))
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = total = 0
    for name, dims in shape.tensors():
        count = tensor_bytes("BF16", dims)
        if size + count > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, dims))
        size += count
        total += count
    noise = torch.randn(BLOCK_BYTES // 2, generator=torch.Generator().manual_seed(0)) * 0.02
    block = memoryview(noise.bfloat16().view(torch.uint8).numpy().data)
    weight_map = {}
    for i, tensors in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys((key for key, _ in tensors), name)
        _write_shard(folder / name, tensors, block)
        say(f"made {name}")
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]], block: memoryview) -> None:
    left = sum(tensor_bytes("BF16", dims) for _, dims in tensors)
    with path.open("wb") as file:
        file.write(build_header([(name, "BF16", dims) for name, dims in tensors]))
        while left:
            left -= file.write(block[: min(left, len(block))])
        file.flush()
        os.fsync(file.fileno())
        forget(file.fileno())


def forget(descriptor: int) -> None:
    """Drop a file from the page cache, so that the next read is the disk's."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def read_rate(path: Path, direct: bool) -> float:
    """Bytes per second of reading the first GiBs of a cold file in sequence."""
    import mmap

    buffer = mmap.mmap(-1, PIECE_BYTES)  # page-aligned, as O_DIRECT needs
    descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    try:
        forget(descriptor)
        end = min(path.stat().st_size // PIECE_BYTES * PIECE_BYTES, READ_BYTES)
        begin, at = time.perf_counter(), 0
        while at < end:
            at += os.preadv(descriptor, [buffer], at)
        return at / (time.perf_counter() - begin)
    finally:
        forget(descriptor)
        os.close(descriptor)


@dataclass(slots=True)
class Rates:
    """What disk and quantizer reach, sample by sample."""

    folder: Path
    jobs: int
    direct: list[float] = field(default_factory=list)  # bytes per second
    cached: list[float] = field(default_factory=list)
    making: list[float] = field(default_factory=list)  # weights per second
    making_cpu: list[float] = field(default_factory=list)  # weights per second of CPU time

    def sample(self) -> None:
        """Measure everything once."""
        shard = max(self.folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
        self.direct.append(read_rate(shard, direct=True))
        self.cached.append(read_rate(shard, direct=False))
        rate, cpu_rate = quantizing_rate(self.folder, self.jobs, 4 * self.jobs)
        self.making.append(rate)
        self.making_cpu.append(cpu_rate)


def quantizing_rate(folder: Path, jobs: int, experts: int) -> tuple[float, float]:
    """Weights per second, and per second of CPU time, of making records of an expert in memory."""
    torch.set_num_threads(1)
    with open_checkpoint(folder) as source:
        layout, tensors = source.layouts[0], source.expert(ExpertKey(0, 0))
    weights = experts * sum(tensor.numel() for tensor in tensors.values())
    begin, cpu = time.perf_counter(), time.process_time()
    for _ in in_order(lambda _: encode(layout, tensors), range(experts), jobs):
        pass
    return weights / (time.perf_counter() - begin), weights / (time.process_time() - cpu)


def convert(checkpoint: Path, store: Path, rates: Rates, limit: int) -> tuple[float, float, Peaks]:
    """Convert in a child process.

    Returns:
        The seconds it took, without those in which it was held; its CPU seconds; its most memory.
    """
    fate = [sys.executable, "-m", "fate_moe", "convert", str(checkpoint), str(store)]
    command = [*fate, "--jobs", str(rates.jobs), "--json"]
    begin = time.perf_counter()
    cpu = os.times()
    # Out of our process group: Ctrl-C must reach the one that cleans up, not the cgroup's keeper.
    process = subprocess.Popen(
        limited(command, limit) if limit else command, stdout=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    peaks, held, last = Peaks(), 0.0, begin
    try:
        while process.poll() is None:
            peaks = watch(process.pid, bool(limit), peaks)
            time.sleep(0.2)
            if time.perf_counter() - last > SAMPLE_S:
                pause = time.perf_counter()
                send(process.pid, bool(limit), signal.SIGSTOP)
                rates.sample()
                send(process.pid, bool(limit), signal.SIGCONT)
                last = time.perf_counter()
                held += last - pause
    except BaseException:
        send(process.pid, bool(limit), signal.SIGKILL)  # what it made is thrown away
        process.wait()
        raise
    seconds = time.perf_counter() - begin - held
    if process.returncode:
        raise SystemExit(f"fate convert ended with {process.returncode}")
    now = os.times()
    used = now.children_user + now.children_system - cpu.children_user - cpu.children_system
    return seconds, used, peaks


def send(pid: int, is_limited: bool, number: int) -> None:
    """Send a signal to the processes that convert."""
    for member in members(pid, is_limited):
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, number)


def members(pid: int, is_limited: bool) -> list[int]:
    """List the processes that convert."""
    if not is_limited:
        return [pid]
    with contextlib.suppress(OSError):
        return [int(line) for line in (group_folder(pid) / "cgroup.procs").read_text().split()]
    return []


def watch(pid: int, is_limited: bool, peaks: Peaks) -> Peaks:
    """Raise `peaks` to what is seen now; both are high-water marks that the kernel keeps."""
    process, group = peaks.process, peaks.group
    for member in members(pid, is_limited):
        with contextlib.suppress(OSError, IndexError):
            status = Path(f"/proc/{member}/status").read_text()
            process = max(process, int(status.split("VmHWM:")[1].split()[0]) * 1024)
    for name in ("memory.max_usage_in_bytes", "memory.peak") if is_limited else ():
        with contextlib.suppress(OSError):
            group = max(group or 0, int((group_folder(pid) / name).read_text()))
    return Peaks(process, group)


def table(rows: list[tuple[str, str]]) -> str:
    lines = ["| what | figure |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows)]
    return "\n".join(lines) + "\n"


def measure(work: Path, shape: Shape, jobs: int | None, limit: int) -> str:
    """Make, measure and convert in `work`; return the section's text."""
    checkpoint, store = work / "checkpoint", work / "store"
    size = make_checkpoint(shape, checkpoint)
    rates = Rates(checkpoint, min(jobs or default_jobs(shape.expert_weights), shape.experts))
    rates.sample()
    alone, _ = quantizing_rate(checkpoint, 1, 4)
    say("converting")
    seconds, cpu, peaks = convert(checkpoint, store, rates, limit)
    rates.sample()
    if not verify(store).is_intact:
        raise SystemExit("the store is damaged")
    made = sum(path.stat().st_size for path in store.iterdir())
    rows = [
        ("checkpoint", f"{format_bytes(size)}, bf16; {shape.layers} layers of {shape.experts} "
         f"experts of {shape.expert_weights / 1e6:.2f} M weights"),
        ("store", format_bytes(made)),
        ("quantizing, one thread, before", f"{alone / 1e6:.1f} M weights/s"),
        *times(shape, size, rates, seconds, cpu),
        ("peak memory of the process", format_bytes(peaks.process)),
    ]  # fmt: skip
    if peaks.group is not None:
        text = f"{format_bytes(peaks.group)} of {format_bytes(limit)}"
        rows.append(("peak of its memory cgroup, page cache included", text))
    head = (
        f"{datetime.now(UTC):%Y-%m-%d}, {processor()}; load {os.getloadavg()[0]:.1f} at the end, "
        f"other work included. Rates: mean and range of {len(rates.making)} samples, taken before, "
        "while the conversion was held, and after.\n"
    )
    return f"{head}\n{table(rows)}"


def times(
    shape: Shape, size: int, rates: Rates, seconds: float, cpu: float
) -> list[tuple[str, str]]:
    """Compare the conversion with the least time that disk and quantizer would need."""
    weights = shape.layers * shape.experts * shape.expert_weights
    reading = max(statistics.mean(rates.direct), statistics.mean(rates.cached))
    making, making_cpu = statistics.mean(rates.making), statistics.mean(rates.making_cpu)
    reading_s, making_s, making_cpu_s = size / reading, weights / making, weights / making_cpu
    slower = "quantizing" if making_s >= reading_s else "reading"
    return [
        ("disk read, O_DIRECT", f"{span(rates.direct, MIB)} MiB/s"),
        ("disk read, cold page cache", f"{span(rates.cached, MIB)} MiB/s"),
        (f"quantizing, {rates.jobs} threads", f"{span(rates.making, 1e6)} M weights/s, "
         f"or {2 * making / MIB:.0f} MiB/s of bf16"),
        ("least time: reading everything", f"{reading_s:.0f} s"),
        ("least time: quantizing the experts", f"{making_s:.0f} s, {making_cpu_s:.0f} s of CPU"),
        (f"conversion with --jobs {rates.jobs}, start to end", f"{seconds:.0f} s "
         f"({size / seconds / MIB:.0f} MiB/s), {cpu:.0f} s of CPU"),
        (f"share of the slower, {slower}", f"{100 * max(reading_s, making_s) / seconds:.0f} %"),
        ("share of the CPU time that quantizing takes", f"{100 * making_cpu_s / cpu:.0f} %"),
    ]  # fmt: skip


def span(values: list[float], unit: float) -> str:
    mean, low, high = (x / unit for x in (statistics.mean(values), min(values), max(values)))
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def workplace(parent: Path | None, keep: bool) -> Iterator[Path]:
    """Make a folder, and remove it whatever happens; SIGTERM counts as Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before: Callable[..., object] | int | None = signal.signal(signal.SIGTERM, interrupt)
    folder = Path(tempfile.mkdtemp(prefix="fate-convert-", dir=parent))
    try:
        yield folder
    finally:
        if keep:
            say(f"kept {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=Shape().layers)
    parser.add_argument("--memory", default="4GiB", help="limit of the cgroup; 0: none")
    parser.add_argument("--jobs", type=int, default=None)
    parser.add_argument("--work", type=Path, default=None, help="where to make the folder")
    parser.add_argument("--keep", action="store_true", help="leave checkpoint and store")
    parser.add_argument("--out", type=Path, default=None, help="document to fill")
    options = parser.parse_args(arguments)
    limit = parse_size(options.memory, "memory").of(0)
    reason = unavailable() if limit else None
    if reason:
        raise SystemExit(f"no memory cgroup: {reason}; --memory 0 goes without")
    shape = Shape(layers=options.layers)
    size = sum(tensor_bytes("BF16", dims) for _, dims in shape.tensors())
    with workplace(options.work, options.keep) as folder:
        check_space(folder, size + size // 3 + (1 << 30), "try fewer --layers or another --work")
        text = measure(folder, shape, options.jobs, limit)
    print(text)
    if options.out is not None:
        document = options.out.read_text(encoding="utf-8")
        options.out.write_text(fill(document, "convert", text), encoding="utf-8")


if __name__ == "__main__":
    main()
