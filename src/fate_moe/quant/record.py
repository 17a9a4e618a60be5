"""At which byte of an expert's record does each part lie?

A record of 4 bits is `[metadata | high 2-bit plane | low 2-bit plane]`. The first two parts are the
INT2 expert, all three the INT4 expert, so one copy on disk serves both.

    metadata    per matrix: scales fp16 [rows, cols/group], then zeros fp16 [rows, cols/group];
                then per bias: float32 [size]
    high plane  per matrix: uint8 [rows, cols/4], bits 3..2 of every code
    low plane   per matrix: uint8 [rows, cols/4], bits 1..0 of every code

Inside a plane the rows follow each other, in a row the groups; a group of G weights is G/4 bytes
and byte j holds weights j, j+G/4, j+2G/4, j+3G/4 at bits 0, 2, 4, 6. That order is the same on
every machine, and a SIMD kernel unpacks it by shift and mask into contiguous runs.

Other records have no planes, and so no head. After the metadata comes, per matrix in row-major
order:

    8 bits         the codes, uint8 [rows, cols]
    16 or 32 bits  the source's own values, little-endian [rows, cols]; no scales and no zeros

Invariants: every section starts on a multiple of 64 bytes, `record_bytes` is a multiple of 4096.
Knows no torch and no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fate_moe.errors import FormatError, ModelError
from fate_moe.types import Json

SECTION_ALIGN = 64  # bytes: one cache line, one AVX-512 load
RECORD_ALIGN = 4096  # bytes: what O_DIRECT asks of offset, length and address
GROUPS = (64, 32)  # weights that share a scale and a zero, the preferred one first
DTYPES = {4: ("",), 8: ("",), 16: ("bfloat16", "float16"), 32: ("float32",)}  # by bits
MAX_DIM = 1 << 20  # rows, cols or bias size; the largest models have about 2**15
MAX_SECTIONS = 16  # matrices or biases of one expert
MAX_RECORD_BYTES = 1 << 34

_MATRIX_FIELDS: dict[str, type] = {"name": str, "rows": int, "cols": int, "group": int}
_BIAS_FIELDS: dict[str, type] = {"name": str, "size": int}


@dataclass(frozen=True, slots=True)
class MatrixSpec:
    """One matrix [rows, cols] = [out, in], with `group` weights per scale and zero; 0: none."""

    name: str
    rows: int
    cols: int
    group: int

    def __post_init__(self) -> None:
        _check_name(self.name)
        for field in ("rows", "cols"):
            _check_range(f"matrix {self.name}: {field}", getattr(self, field), 1, MAX_DIM)
        if type(self.group) is int and self.group == 0:
            return
        if self.group not in GROUPS or self.cols % self.group:
            raise FormatError(
                f"matrix {self.name}: group {self.group!r} must be one of {GROUPS} and divide "
                f"cols {self.cols}, or be 0 where there are no scales"
            )

    @property
    def groups(self) -> int:
        """Groups in one row; 0 without scales."""
        return self.cols // self.group if self.group else 0

    @property
    def meta_bytes(self) -> int:
        """Bytes of the fp16 scales; the zeros take as many."""
        return 2 * self.rows * self.groups

    @property
    def plane_bytes(self) -> int:
        """Bytes of one 2-bit plane."""
        return self.rows * self.cols // 4


@dataclass(frozen=True, slots=True)
class BiasSpec:
    """One bias vector [size], kept in float32."""

    name: str
    size: int

    def __post_init__(self) -> None:
        _check_name(self.name)
        _check_range(f"bias {self.name}: size", self.size, 1, MAX_DIM)


@dataclass(frozen=True, slots=True)
class MatrixOffsets:
    """Where the sections of one matrix start, in bytes from the start of the record.

    Only 4 bits have two planes; elsewhere `high` and `low` both are where the values start.
    """

    scale: int
    zero: int
    high: int
    low: int

    @property
    def values(self) -> int:
        """Start of the codes of 8 bits, or of the values of 16 and 32."""
        return self.high


@dataclass(frozen=True)
class RecordLayout:
    """The byte layout of every expert of one layer.

    Attributes:
        matrices: matrices in record order.
        biases: float32 vectors in record order.
        bits: per weight; 4 and 8 are codes, 16 and 32 are the source's own values.
        dtype: of the stored values, such as "bfloat16"; "" for codes.
    """

    matrices: tuple[MatrixSpec, ...]
    biases: tuple[BiasSpec, ...] = ()
    bits: int = 4
    dtype: str = ""

    def __post_init__(self) -> None:
        _check_range("number of matrices", len(self.matrices), 1, MAX_SECTIONS)
        _check_range("number of biases", len(self.biases), 0, MAX_SECTIONS)
        names = [m.name for m in self.matrices] + [b.name for b in self.biases]
        if len(set(names)) != len(names):
            raise FormatError(f"record layout names a parameter twice: {', '.join(names)}")
        self._check_bits()
        _check_range("record_bytes", self.record_bytes, RECORD_ALIGN, MAX_RECORD_BYTES)

    def _check_bits(self) -> None:
        if type(self.bits) is not int or self.bits not in DTYPES:
            known = ", ".join(map(str, DTYPES))
            raise FormatError(
                f"layout: bits is {self.bits!r:.40}, this version reads one of {known}"
            )
        if self.dtype not in DTYPES[self.bits]:
            known = " or ".join(map(repr, DTYPES[self.bits]))
            raise FormatError(f"layout: dtype is {self.dtype!r:.40}, {self.bits} bits need {known}")
        for matrix in self.matrices:
            if (matrix.group == 0) != self.is_unquantized:
                need = "0" if self.is_unquantized else f"one of {GROUPS}"
                raise FormatError(
                    f"layout: matrix {matrix.name}: group is {matrix.group}, {self.bits} bits "
                    f"need {need}"
                )

    @property
    def is_unquantized(self) -> bool:
        """Whether the record holds the source's own values, with no scales and no zeros."""
        return self.bits > 8

    @cached_property
    def offsets(self) -> tuple[MatrixOffsets, ...]:
        """Section starts per matrix, in the order of `matrices`."""
        return self._plan[0]

    @cached_property
    def bias_offsets(self) -> tuple[int, ...]:
        """Section start per bias, in the order of `biases`."""
        return self._plan[1]

    @cached_property
    def head_bytes(self) -> int:
        """End of the high plane, which is the INT2 expert; without planes, of all sections.

        A multiple of 64.
        """
        return self._plan[2]

    @cached_property
    def record_bytes(self) -> int:
        """All bytes of the record with its padding; a multiple of 4096."""
        return self._plan[3]

    @cached_property
    def _plan(self) -> tuple[tuple[MatrixOffsets, ...], tuple[int, ...], int, int]:
        end = 0

        def take(size: int) -> int:
            nonlocal end
            start, end = end, round_up(end + size, SECTION_ALIGN)
            return start

        meta = [(take(m.meta_bytes), take(m.meta_bytes)) for m in self.matrices]
        biases = tuple(take(4 * bias.size) for bias in self.biases)
        if self.bits == 4:
            high = [take(m.plane_bytes) for m in self.matrices]
            head_bytes = end
            low = [take(m.plane_bytes) for m in self.matrices]
        else:
            high = low = [take(m.rows * m.cols * self.bits // 8) for m in self.matrices]
            head_bytes = end
        starts = zip(meta, high, low, strict=True)
        offsets = tuple(MatrixOffsets(s, z, h, lo) for (s, z), h, lo in starts)
        return offsets, biases, head_bytes, round_up(end, RECORD_ALIGN)

    def to_json(self) -> dict[str, object]:
        """Describe the layout in JSON types; `from_json` is the inverse."""
        dtype = {"dtype": self.dtype} if self.is_unquantized else {}
        return {
            "bits": self.bits,
            **dtype,
            "matrices": [
                {"name": m.name, "rows": m.rows, "cols": m.cols, "group": m.group}
                for m in self.matrices
            ],
            "biases": [{"name": b.name, "size": b.size} for b in self.biases],
        }

    @classmethod
    def from_json(cls, data: Json) -> RecordLayout:
        """Parse what `to_json` wrote; the input is not trusted.

        Raises:
            FormatError: a field is missing, unknown, of the wrong type or out of range.
        """
        bits = data.get("bits") if isinstance(data, Mapping) else None
        dtype = ("dtype",) if bits in (16, 32) else ()
        top = _fields(data, "layout", ("bits", *dtype, "matrices", "biases"))
        matrices = [
            MatrixSpec(**_typed(item, "matrix", _MATRIX_FIELDS))
            for item in _items(top["matrices"], "matrices")
        ]
        biases = [
            BiasSpec(**_typed(item, "bias", _BIAS_FIELDS))
            for item in _items(top["biases"], "biases")
        ]
        rest: dict[str, Any] = {"bits": top["bits"], "dtype": top.get("dtype", "")}
        return cls(tuple(matrices), tuple(biases), **rest)  # which checks both


def choose_group(name: str, cols: int, preferred: int = GROUPS[0]) -> int:
    """Pick the group size of a matrix with `cols` inputs: `preferred` where it divides, else 32.

    Raises:
        ModelError: no group size divides `cols`.
    """
    for group in GROUPS:
        if group <= preferred and cols > 0 and cols % group == 0:
            return group
    raise ModelError(
        f"{name}: {cols} inputs are not a multiple of {GROUPS[-1]}, cannot quantize it"
    )


def round_up(value: int, multiple: int) -> int:
    """Round `value` up to a multiple of `multiple`."""
    return -(-value // multiple) * multiple


def _check_name(name: str) -> None:
    if not (isinstance(name, str) and name.isidentifier() and len(name) <= 64):
        raise FormatError(f"layout: {name!r:.80} is no parameter name")


def _check_range(what: str, value: int, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise FormatError(f"layout: {what} is {value!r:.40}, must be in [{low}, {high}]")


def _fields(data: object, what: str, names: tuple[str, ...]) -> dict[str, object]:
    if not isinstance(data, Mapping) or sorted(map(str, data)) != sorted(names):
        found = sorted(map(str, data))[:8] if isinstance(data, Mapping) else type(data).__name__
        raise FormatError(f"layout: {what} must hold exactly {', '.join(names)}, found {found}")
    return dict(data)


def _items(data: object, what: str) -> list[object]:
    if not isinstance(data, list) or len(data) > MAX_SECTIONS:
        raise FormatError(f"layout: {what} must be a list of at most {MAX_SECTIONS} entries")
    return data


def _typed(data: object, what: str, types: dict[str, type]) -> dict[str, Any]:
    fields = _fields(data, what, tuple(types))
    for name, kind in types.items():
        if type(fields[name]) is not kind:
            raise FormatError(
                f"layout: {what}: {name} is {fields[name]!r:.40}, must be {kind.__name__}"
            )
    return fields
