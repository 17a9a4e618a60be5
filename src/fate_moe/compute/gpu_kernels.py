"""How does a GPU multiply tokens by experts that lie in slots as records?

Three Triton kernels: the first matrix with the activation behind it, the second matrix with the
router's weight, and the sum of a token's experts. A tile is a few tokens of one expert; it finds
the record by its slot and unpacks what it multiplies, so nothing is decoded beforehand, and a
launch may mix INT4 experts with INT2 ones.

Weights are those of `quant.codec`, exactly: (q - zero) * scale in float32, where a low expert's q
is 4 * high + 1.5, the middle of the four codes that its high plane leaves open.
"""

import triton
import triton.language as tl

# Triton's interpreter keeps bfloat16 as whole numbers, and its product multiplies those.
WIDENED = tl.constexpr(triton.knobs.runtime.interpret)
SIXTEEN = tl.constexpr(0x41800000)  # the bits of 16.0: its next lower places count 8, 4, 2 and 1
MIDDLE = tl.constexpr(0xC0000)  # the 1.5 that a low expert's q has


@triton.jit
def up_kernel(
    slots, slot_bytes, tiles, order, x, out, K,
    ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr,
    SCALE: tl.constexpr, ZERO: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
    BIAS: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr, LIMIT_AFTER: tl.constexpr,
    M: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Write the activations [A, F] of a tile's tokens, R of the F at a time."""
    F: tl.constexpr = ROWS // 2 if GATED else ROWS
    record, low, position, live = _tile(slots, slot_bytes, tiles, M)
    f = tl.program_id(1) * R + tl.arange(0, R)
    token = x + (tl.load(order + position, mask=live, other=0) // K).to(tl.int64) * COLS
    real = f < F
    if M == 1:
        real = real & live  # a tile of no token reads nothing
    up_row = f * 2 + 1 if INTERLEAVED else (f + F if GATED else f)
    up = _product(record, low, token, live, up_row, real,
                  COLS, GROUP, SCALE, ZERO, HIGH, LOW, BIAS, M, R, B)  # fmt: skip
    if GATED:
        gate_row = f * 2 if INTERLEAVED else f
        gate = _product(record, low, token, live, gate_row, real,
                        COLS, GROUP, SCALE, ZERO, HIGH, LOW, BIAS, M, R, B)  # fmt: skip
        if not LIMIT_AFTER:
            gate = tl.minimum(gate, LIMIT)
        y = _act(gate, ACT, ALPHA)
        if LIMIT_AFTER:
            y = tl.minimum(y, LIMIT)
        y *= tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + OFFSET
    else:
        y = _act(up, ACT, ALPHA)
    place = out + position.to(tl.int64)[None, :] * F + f[:, None]
    tl.store(place, y.to(out.dtype.element_ty), mask=live[None, :] & (f < F)[:, None])


@triton.jit
def down_kernel(
    slots, slot_bytes, tiles, order, weights, inner, out,
    ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr,
    SCALE: tl.constexpr, ZERO: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
    BIAS: tl.constexpr, M: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Write what an expert adds to a tile's tokens, [A, D], R of the D at a time."""
    record, low, position, live = _tile(slots, slot_bytes, tiles, M)
    row = tl.program_id(1) * R + tl.arange(0, R)
    real = row < ROWS
    if M == 1:
        real = real & live
    y = _product(record, low, inner + position.to(tl.int64) * COLS, live, row, real,
                 COLS, GROUP, SCALE, ZERO, HIGH, LOW, BIAS, M, R, B)  # fmt: skip
    choice = tl.load(order + position, mask=live, other=0)
    y *= tl.load(weights + choice, mask=live, other=0).to(tl.float32)[None, :]
    place = out + position.to(tl.int64)[None, :] * ROWS + row[:, None]
    tl.store(place, y.to(out.dtype.element_ty), mask=live[None, :] & (row < ROWS)[:, None])


@triton.jit
def sum_kernel(parts, positions, out, K: tl.constexpr, D: tl.constexpr, B: tl.constexpr):
    """Add up a token's parts in the order of `positions`, in the model's dtype."""
    token = tl.program_id(0)
    column = tl.program_id(1) * B + tl.arange(0, B)
    total = tl.zeros((B,), out.dtype.element_ty)
    for k in range(K):
        position = tl.load(positions + token * K + k).to(tl.int64)
        part = tl.load(parts + position * D + column, mask=column < D, other=0)
        total = (total.to(tl.float32) + part.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + token.to(tl.int64) * D + column, total, mask=column < D)


@triton.jit
def _tile(slots, slot_bytes, tiles, M: tl.constexpr):
    # A tile is (slot, low, first, count): `count` places from `first` on among the choices by
    # ascending expert.
    at = tiles + tl.program_id(0) * 4
    record = slots + tl.load(at).to(tl.int64) * slot_bytes
    place = tl.arange(0, M)
    return record, tl.load(at + 1), tl.load(at + 2) + place, place < tl.load(at + 3)


@triton.jit
def _product(
    record, low, token, live, row, real,
    COLS: tl.constexpr, GROUP: tl.constexpr,
    SCALE: tl.constexpr, ZERO: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
    BIAS: tl.constexpr, M: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Multiply some rows of a matrix by tokens [M, COLS] and add their bias: [R, M] float32."""
    QUARTER: tl.constexpr = GROUP // 4  # a byte's four weights lie so far apart
    N: tl.constexpr = B // QUARTER  # groups at a time
    halves = record.to(tl.pointer_type(tl.float16))
    # Compared as a tile: the interpreter of Triton 3.9 spoils what a scalar comparison spreads to.
    whole = tl.zeros((R, N, QUARTER), tl.int32) + low == 0
    base = tl.where(whole, SIXTEEN, SIXTEEN | MIDDLE)
    q = tl.arange(0, QUARTER)
    total = tl.zeros((R, N) if M == 1 else (R, M), tl.float32)
    for start in range(0, COLS // GROUP, N):
        group = start + tl.arange(0, N)
        inside = group < COLS // GROUP
        there = real[:, None] & inside[None, :]
        number = row[:, None] * (COLS // GROUP) + group[None, :]
        place = number[:, :, None] * QUARTER + q[None, None, :]
        high = tl.load(record + HIGH + place, mask=there[:, :, None], other=0).to(tl.int32)
        rest = tl.load(record + LOW + place, mask=there[:, :, None] & whole, other=0).to(tl.int32)
        scale = tl.load(halves + SCALE // 2 + number, mask=there, other=0).to(tl.float32)
        zero = tl.load(halves + ZERO // 2 + number, mask=there, other=0).to(tl.float32) + 16
        column = group[:, None] * GROUP + q[None, :]
        if M == 1:
            dots = tl.zeros((R, N, QUARTER), tl.float32)
            sums = tl.zeros((R, N, QUARTER), tl.float32)
            at = token[:, None, None] + column[None, :, :] + tl.zeros((R, 1, 1), tl.int32)
            for quarter in tl.static_range(4):
                # Every row's threads load the tokens they need: they would wait for each other.
                x = tl.load(at + quarter * QUARTER, mask=there[:, :, None], other=0)
                code = _code(high, rest, base, quarter)
                if x.dtype == tl.float32:  # taken apart below, a sum would lose two bits
                    code -= zero[:, :, None]
                else:
                    sums += x.to(tl.float32)
                dots += code * x.to(tl.float32)
            total += (tl.sum(dots, axis=2) - zero * tl.sum(sums, axis=2)) * scale
        else:
            for quarter in tl.static_range(4):
                code = _code(high, rest, base, quarter)
                weight = tl.reshape((code - zero[:, :, None]) * scale[:, :, None], (R, B))
                at = tl.reshape(column, (B,)) + quarter * QUARTER
                x = tl.load(token[None, :] + at[:, None],
                            mask=live[None, :] & (at < COLS)[:, None], other=0)  # fmt: skip
                weight = weight.to(x.dtype)
                if WIDENED:
                    x, weight = x.to(tl.float32), weight.to(tl.float32)
                total = tl.dot(weight, x, total, input_precision="ieee")
    y = tl.sum(total, axis=1)[:, None] if M == 1 else total
    if BIAS >= 0:
        bias = (record + BIAS).to(tl.pointer_type(tl.float32))
        y += tl.load(bias + row, mask=real, other=0)[:, None]
    return y


@triton.jit
def _code(high, rest, base, quarter: tl.constexpr):
    """Return 16 + q as float32: two bits of each plane, put where they count 4 and 1 each.

    Converting a whole number would take a GPU four times as long as putting bits in place.
    """
    coarse = (high << (21 - 2 * quarter)) & 0x600000
    fine = (rest << (19 - 2 * quarter)) & 0x180000
    return (coarse | fine | base).to(tl.float32, bitcast=True)


@triton.jit
def _act(x, ACT: tl.constexpr, ALPHA: tl.constexpr):
    if ACT == "SILU":
        y = x * tl.sigmoid(x * ALPHA)
    elif ACT == "GELU":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACT == "GELU_TANH":  # tanh(u) = 2 * sigmoid(2u) - 1
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "RELU":
        y = tl.maximum(x, 0.0)
    else:
        y = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    return y
