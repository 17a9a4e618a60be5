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
  static constexpr int kTile = 32;    // tokens whose values stay in the first cache

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
  static constexpr int kRows = kKeysAtOnce;
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

  // N tokens at a time, of those from `t` to `to`, as far as they go; returns what is left.
  template <int N, class Weight>
  static int meet(const Weight* w, const float* x, int cols, int from, int t, int to, float* y,
                  std::size_t rows) {
    for (; t + N <= to; t += N) {
      const float* at = x + static_cast<std::size_t>(t) * cols;
      if (t == from) tile<N, true>(w, at, cols, y + t * rows, rows);
      else tile<N, false>(w, at, cols, y + t * rows, rows);
    }
    return t;
  }

  template <class Weight>
  static void gemm(const Weight* w, const float* x, int cols, int tokens, int first, int last,
                   float* y, std::size_t rows) {
    for (int from = 0; from < tokens; from += kBlock) {
      const int to = least(from + kBlock, tokens);
      int r = first;
      for (; r + kRows <= last; r += kRows) {
        const Weight* row = w + static_cast<std::size_t>(r) * cols;
        int t = meet<kAtOnce>(row, x, cols, from, from, to, y + r, rows);
        if constexpr (kAtOnce > 2) t = meet<2>(row, x, cols, from, t, to, y + r, rows);
        meet<1>(row, x, cols, from, t, to, y + r, rows);
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

  static float most_of(const float* x, int count) {
    float lanes[16];  // side by side: a compiler makes vectors of them
    for (int j = 0; j < 16; ++j) lanes[j] = x[0];
    int i = 0;
    for (; i + 16 <= count; i += 16)
      for (int j = 0; j < 16; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
    for (; i < count; ++i) lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
    float most = lanes[0];
    for (int j = 1; j < 16; ++j) most = lanes[j] > most ? lanes[j] : most;
    return most;
  }

  static void softmax(float* x, int count) {
    exp_less(x, count, most_of(x, count));
    const float share = 1.0f / sum_of(x, count);
    for (int i = 0; i < count; ++i) x[i] *= share;
  }

  static void score(const float* q, const float* keys, int dim, int queries, int first, int last,
                    float scale, float* scores, std::size_t length) {
    if (queries > 1) {
      gemm(keys, q, dim, queries, first, last, scores, length);
    } else {  // memory is read fastest on and on
      for (int t = first; t < last; ++t)
        scores[t] = dot(q, keys + static_cast<std::size_t>(t) * dim, dim);
    }
    for (int g = 0; g < queries; ++g)
      for (int t = first; t < last; ++t) scores[g * length + t] *= scale;
  }

  // out[n] += sum_t p[n][t] * rows[t], of N queries, V vectors of columns; bits do not depend on either.
  // All ask for the same columns of the next tile: where only the first did, it took longer.
  template <int N, int V>
  static void add_rows(const float* p, std::size_t apart, const float* rows, int count, int dim,
                       float* out) {
    F s[N][V];
    for (int n = 0; n < N; ++n)
      for (int j = 0; j < V; ++j) s[n][j] = S::f_load(out + n * dim + j * L);
    for (int t = 0; t < count; ++t) {
      const float* row = rows + static_cast<std::size_t>(t) * dim;
      for (int j = 0; j < V; j += 16 / L)
        FATE_PREFETCH(row + static_cast<std::size_t>(kTile) * dim + j * L);
      F value[V];
      for (int j = 0; j < V; ++j) value[j] = S::f_load(row + j * L);
      for (int n = 0; n < N; ++n) {
        const F share = S::f_set(p[n * apart + t]);
        for (int j = 0; j < V; ++j) s[n][j] = S::fma(share, value[j], s[n][j]);
      }
    }
    for (int n = 0; n < N; ++n)
      for (int j = 0; j < V; ++j) S::f_store(out + n * dim + j * L, s[n][j]);
  }

  // The same for columns from `d` to `last` as far as V vectors go; returns where what is left begins.
  template <int N, int V>
  static int add_some(const float* p, std::size_t apart, const float* rows, int count, int dim, int d,
                      int last, float* out) {
    for (; d + V * L <= last; d += V * L) add_rows<N, V>(p, apart, rows + d, count, dim, out + d);
    return d;
  }

  template <int N>
  static void add_columns(const float* p, std::size_t apart, const float* rows, int count, int dim,
                          int first, int last, float* out) {
    int d = first;
    if constexpr (N == 1)  // registers allow more
      d = add_some<N, 8>(p, apart, rows, count, dim, d, last, out);
    d = add_some<N, 4>(p, apart, rows, count, dim, d, last, out);
    d = add_some<N, 2>(p, apart, rows, count, dim, d, last, out);
    d = add_some<N, 1>(p, apart, rows, count, dim, d, last, out);
    for (int n = 0; n < N && d < last; ++n)
      for (int t = 0; t < count; ++t)
        for (int i = d; i < last; ++i)
          out[n * dim + i] = S::fma(p[n * apart + t], rows[static_cast<std::size_t>(t) * dim + i],
                                    out[n * dim + i]);
  }

  static void mix(const float* shares, const float* values, int length, int dim, int queries,
                  int first, int last, float* out) {
    const std::size_t apart = length;
    for (int g = 0; g < queries; ++g)
      std::memset(out + g * dim + first, 0, sizeof(float) * (last - first));
    for (int from = 0; from < length; from += kTile) {
      const int count = least(kTile, length - from);
      const float* rows = values + static_cast<std::size_t>(from) * dim;
      int g = 0;
      for (; g + 2 <= queries; g += 2)
        add_columns<2>(shares + g * apart + from, apart, rows, count, dim, first, last, out + g * dim);
      if (g < queries)
        add_columns<1>(shares + g * apart + from, apart, rows, count, dim, first, last, out + g * dim);
    }
  }

  static constexpr DecodeKernels table() {
    return {S::name, rms_norm, rotate, gemv, gemm<std::uint16_t>, score, mix, softmax};
  }
};

}  // namespace
}  // namespace fate
