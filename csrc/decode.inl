// Norm, rotation, attention and float products of one token, once for every vector unit `S`.
//
// Sums run in lanes, in an order that depends on the instruction set alone. What is left of them is
// multiplied and added by S::fma too: a compiler would take one instruction here and two there.
#include <cmath>
#include <cstring>

#include "codes.inl"
#include "decode.h"
#include "gate.inl"

namespace fate {
namespace {

template <class S> struct Decode {
  using F = typename S::F;
  static constexpr int L = 4 * S::W;  // floats of a vector
  static constexpr int kTile = 64;    // tokens whose keys, then values, stay in the first cache

  // Weights are floats, or bfloat16: the upper half of a float.
  static F wide(const float* w) { return S::f_load(w); }
  static F wide(const std::uint16_t* w) { return S::f_bfloat(w); }
  static float wide_one(float w) { return w; }
  static float wide_one(std::uint16_t w) {
    const std::uint32_t bits = static_cast<std::uint32_t>(w) << 16;
    float out = 0;
    std::memcpy(&out, &bits, sizeof out);
    return out;
  }

  template <class Weight> static float dot(const Weight* a, const float* b, int count) {
    F s[4] = {S::f_zero(), S::f_zero(), S::f_zero(), S::f_zero()};
    int i = 0;
    for (; i + 4 * L <= count; i += 4 * L)
      for (int j = 0; j < 4; ++j) s[j] = S::fma(wide(a + i + j * L), S::f_load(b + i + j * L), s[j]);
    for (; i + L <= count; i += L) s[0] = S::fma(wide(a + i), S::f_load(b + i), s[0]);
    float sum = S::sum(S::add(S::add(s[0], s[1]), S::add(s[2], s[3])));
    for (; i < count; ++i) sum = S::fma(wide_one(a[i]), b[i], sum);
    return sum;
  }

  static void rms_norm(const float* x, const float* weight, int count, float eps, float* out) {
    const float scale = 1.0f / std::sqrt(dot(x, x, count) / static_cast<float>(count) + eps);
    for (int i = 0; i < count; ++i) out[i] = weight[i] * (x[i] * scale);
  }

  static void rotate(float* x, const float* cos, const float* sin, int half) {
    for (int i = 0; i < half; ++i) {
      const float a = x[i], b = x[i + half];
      x[i] = a * cos[i] - b * sin[i];
      x[i + half] = b * cos[i + half] + a * sin[i + half];
    }
  }

  // Products of kRows rows with N tokens. The first that meet some rows ask for what comes after them:
  // the processor's own guess sees four short streams.
  static constexpr int kRows = 4;
  static constexpr int kAhead = 4096;  // bytes
  template <int N, bool kAsks, class Weight>
  static void tile(const Weight* w, const float* x, int cols, float* y, std::size_t rows) {
    constexpr int kLine = 64 / sizeof(Weight);
    F s[N][kRows];
    for (int t = 0; t < N; ++t)
      for (int j = 0; j < kRows; ++j) s[t][j] = S::f_zero();
    int i = 0;
    for (; i + L <= cols; i += L) {
      if constexpr (kAsks)
        for (int at = 0; at < kRows * L; at += kLine)
          FATE_PREFETCH(w + kRows * i + at + kAhead / sizeof(Weight));
      F row[kRows];
      for (int j = 0; j < kRows; ++j) row[j] = wide(w + static_cast<std::size_t>(j) * cols + i);
      for (int t = 0; t < N; ++t) {
        const F at = S::f_load(x + static_cast<std::size_t>(t) * cols + i);
        for (int j = 0; j < kRows; ++j) s[t][j] = S::fma(row[j], at, s[t][j]);
      }
    }
    for (int t = 0; t < N; ++t)
      for (int j = 0; j < kRows; ++j) {
        float sum = S::sum(s[t][j]);
        for (int k = i; k < cols; ++k)
          sum = S::fma(wide_one(w[static_cast<std::size_t>(j) * cols + k]),
                       x[static_cast<std::size_t>(t) * cols + k], sum);
        y[t * rows + j] = sum;
      }
  }

  static void gemv(const float* w, const float* x, int cols, int first, int last, float* y) {
    int r = first;
    for (; r + kRows <= last; r += kRows)
      tile<1, true>(w + static_cast<std::size_t>(r) * cols, x, cols, y + r - first, 0);
    for (; r < last; ++r) y[r - first] = dot(w + static_cast<std::size_t>(r) * cols, x, cols);
  }

  static constexpr int kAtOnce = S::W == 2 ? 2 : 6;   // tokens of a tile: as registers allow
  static constexpr int kBlock = 48;                   // tokens that stay in the second cache

  static void gemm(const std::uint16_t* w, const float* x, int cols, int tokens, int first,
                   int last, float* y, std::size_t rows) {
    for (int from = 0; from < tokens; from += kBlock) {
      const int to = least(from + kBlock, tokens);
      int r = first;
      for (; r + kRows <= last; r += kRows) {
        const std::uint16_t* row = w + static_cast<std::size_t>(r) * cols;
        const auto meet = [&](auto tile, int t) {
          tile(row, x + static_cast<std::size_t>(t) * cols, cols, y + t * rows + r, rows);
        };
        int t = from;
        if (t + kAtOnce <= to) {
          meet(tile<kAtOnce, true, std::uint16_t>, t);
          t += kAtOnce;
        } else {
          meet(tile<1, true, std::uint16_t>, t++);
        }
        for (; t + kAtOnce <= to; t += kAtOnce) meet(tile<kAtOnce, false, std::uint16_t>, t);
        for (; t < to; ++t) meet(tile<1, false, std::uint16_t>, t);
      }
      for (; r < last; ++r)
        for (int t = from; t < to; ++t)
          y[t * rows + r] = dot(w + static_cast<std::size_t>(r) * cols,
                                x + static_cast<std::size_t>(t) * cols, cols);
    }
  }

  static void exp_less(float* x, int count, float most) {
    for (int i = 0; i < count; ++i) x[i] = exp_of(x[i] - most);
  }

  static float sum_of(const float* x, int count) {
    F lanes = S::f_zero();
    int i = 0;
    for (; i + L <= count; i += L) lanes = S::add(lanes, S::f_load(x + i));
    float sum = S::sum(lanes);
    for (; i < count; ++i) sum += x[i];
    return sum;
  }

  static void softmax(float* x, int count) {
    float most = x[0];
    for (int i = 1; i < count; ++i) most = x[i] > most ? x[i] : most;
    exp_less(x, count, most);
    const float share = 1.0f / sum_of(x, count);
    for (int i = 0; i < count; ++i) x[i] *= share;
  }

  // out += sum_t p[t] * rows[t]
  static void add_rows(const float* p, const float* rows, int count, int dim, float* out) {
    int d = 0;
    for (; d + 4 * L <= dim; d += 4 * L) {
      F s[4];
      for (int j = 0; j < 4; ++j) s[j] = S::f_load(out + d + j * L);
      for (int t = 0; t < count; ++t) {
        const F share = S::f_set(p[t]);
        const float* row = rows + static_cast<std::size_t>(t) * dim + d;
        for (int j = 0; j < 4; ++j) s[j] = S::fma(share, S::f_load(row + j * L), s[j]);
      }
      for (int j = 0; j < 4; ++j) S::f_store(out + d + j * L, s[j]);
    }
    if (d == dim) return;
    for (int t = 0; t < count; ++t)
      for (int i = d; i < dim; ++i)
        out[i] = S::fma(p[t], rows[static_cast<std::size_t>(t) * dim + i], out[i]);
  }

  static void attend(const float* q, const float* keys, const float* values, int length, int dim,
                     int queries, float scale, float* scores, float* out) {
    for (int from = 0; from < length; from += kTile) {
      const int to = least(from + kTile, length);
      for (int g = 0; g < queries; ++g)
        for (int t = from; t < to; ++t)
          scores[static_cast<std::size_t>(g) * length + t] =
              scale * dot(q + static_cast<std::size_t>(g) * dim,
                          keys + static_cast<std::size_t>(t) * dim, dim);
    }
    for (int g = 0; g < queries; ++g) softmax(scores + static_cast<std::size_t>(g) * length, length);
    std::memset(out, 0, sizeof(float) * queries * dim);
    for (int from = 0; from < length; from += kTile) {
      const int count = least(kTile, length - from);
      for (int g = 0; g < queries; ++g)
        add_rows(scores + static_cast<std::size_t>(g) * length + from,
                 values + static_cast<std::size_t>(from) * dim, count, dim,
                 out + static_cast<std::size_t>(g) * dim);
    }
  }

  static constexpr DecodeKernels table() {
    return {S::name, rms_norm, rotate, gemv, gemm, attend, softmax};
  }
};

}  // namespace
}  // namespace fate
