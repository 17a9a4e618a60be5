# What the native core offers; csrc/bindings.cpp says what each call does. Addresses are those of
# contiguous memory that the caller holds for the length of the call.
from collections.abc import Sequence
from enum import Enum

def isas() -> list[str]: ...
def isa() -> str: ...
def use_isa(name: str) -> None: ...
def threads() -> int: ...
def set_threads(threads: int) -> None: ...

class Act(Enum):
    SILU = ...
    GELU = ...
    GELU_TANH = ...
    RELU = ...
    RELU2 = ...

class Gate:
    def __init__(
        self, act: Act, alpha: float, limit: float, offset: float, limit_after: bool
    ) -> None: ...

class MatrixPlace:
    def __init__(
        self,
        rows: int,
        cols: int,
        group: int,
        bits: int,
        scale: int,
        zero: int,
        high: int,
        low: int,
    ) -> None: ...

class ExpertShape:
    def __init__(
        self,
        up: MatrixPlace,
        down: MatrixPlace,
        gated: bool,
        interleaved: bool,
        form: Gate,
        up_bias: int,
        down_bias: int,
    ) -> None: ...

def linear(place: MatrixPlace, record: int, bias: int, x: int, tokens: int, y: int) -> None: ...

class Step:
    def __init__(self) -> None: ...
    def begin(
        self, shape: ExpertShape, x: int, tokens: int, k: int, ids: int, weights: int
    ) -> None: ...
    def run(self, arrived: list[tuple[int, int, bool]]) -> None: ...
    def finish(self, out: int) -> None: ...
    def whole(
        self,
        shape: ExpertShape,
        x: int,
        tokens: int,
        k: int,
        ids: int,
        weights: int,
        arrived: list[tuple[int, int, bool]],
        out: int,
    ) -> None: ...

class TransitionLayer:
    def __init__(
        self, kept: float, following: float, before_last: float, unsure: float, in_use: float
    ) -> None: ...
    def step(self, experts: Sequence[int]) -> None: ...
    def read(self, experts: Sequence[int], counts: Sequence[float], tokens: int) -> None: ...
    def enter(self, expert: int) -> None: ...
    def leave(self, expert: int) -> None: ...
    def ranking(self) -> list[int]: ...
    def worth(self, expert: int) -> float: ...

class Reads:
    def read(self, wanted: list[tuple[int, int, int, int]]) -> list[tuple[int, int]]: ...

class Courier:
    def start(self, asked: list[tuple[int, int, int, int, int]]) -> None: ...
    def withdraw(self, id: int) -> bool: ...
    def drain(self) -> None: ...
    def landed(self) -> list[tuple[int, int, int, float]]: ...
    def wait(self, most_s: float) -> bool: ...

def open_courier(way: str, depth: int, together: int) -> Courier: ...
def read_ways() -> list[str]: ...
def open_reads(way: str, depth: int) -> Reads: ...

class Norm:
    def __init__(self, weight: int, eps: float) -> None: ...

class Projection:
    @staticmethod
    def of_record(place: MatrixPlace, record: int, bias: int) -> Projection: ...
    @staticmethod
    def of_floats(rows: int, cols: int, weight: int, bias: int) -> Projection: ...
    @staticmethod
    def of_bfloats(rows: int, cols: int, weight: int, bias: int) -> Projection: ...

def project(matrix: Projection, x: int, tokens: int, y: int) -> None: ...

class AttentionShape:
    def __init__(
        self,
        heads: int,
        kv_heads: int,
        dim: int,
        rotary: int,
        scale: float,
        q_norm: Norm,
        k_norm: Norm,
        norm_whole: bool,
    ) -> None: ...

def attend(
    shape: AttentionShape,
    q: int,
    k: int,
    v: int,
    cos: int,
    sin: int,
    keys: int,
    values: int,
    stride: int,
    length: int,
    out: int,
) -> None: ...

class AttentionBlock:
    def __init__(
        self,
        shape: AttentionShape,
        q: Projection,
        k: Projection,
        v: Projection,
        o: Projection,
        before: Norm,
        after: Norm,
        residual: float,
    ) -> None: ...
    def attention(
        self, x: int, cos: int, sin: int, keys: int, values: int, stride: int, length: int, out: int
    ) -> None: ...
    def layer(
        self,
        x: int,
        cos: int,
        sin: int,
        keys: int,
        values: int,
        stride: int,
        length: int,
        out: int,
        normed: int,
    ) -> None: ...

def rms_norm(x: int, weight: int, count: int, eps: float, out: int) -> None: ...

class RouterBlock:
    def __init__(self, weight: int, experts: int, width: int, k: int, normalized: bool) -> None: ...
    def run(self, x: int, logits: int, weights: int, ids: int) -> None: ...

class DenseBlock:
    def __init__(
        self, gate: Projection, up: Projection, down: Projection, form: Gate, share: int = 0
    ) -> None: ...
    @property
    def takes_many(self) -> bool: ...
    def many(self, x: int, tokens: int, out: int) -> None: ...
    def start(self, x: int) -> None: ...
    def finish(self, out: int) -> None: ...
