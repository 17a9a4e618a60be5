// What does one token need besides quantized matrices? One table per instruction set, from decode.inl.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fate {

constexpr int kKeysAtOnce = 4;  // that `score` takes together

struct DecodeKernels {
  const char* name;  // that of the Kernels of the same instruction set

  // out[i] = weight[i] * x[i] / sqrt(mean(x^2) + eps). In place is fine.
  void (*rms_norm)(const float* x, const float* weight, int count, float eps, float* out);

  // x[i], x[i + half] turned by cos and sin [2 * half], in place.
  void (*rotate)(float* x, const float* cos, const float* sin, int half);

  // y[r - first] = dot(w[r], x) for rows [first, last) of w [rows, cols].
  void (*gemv)(const float* w, const float* x, int cols, int first, int last, float* y);

  // The same for tokens x [tokens, cols] and bfloat16 weights, each widened first, into
  // y [tokens, rows] at columns [first, last). Every token's bits are those that `gemv` gives it.
  void (*gemm)(const std::uint16_t* w, const float* x, int cols, int tokens, int first, int last,
               float* y, std::size_t rows);

  // scores[g * length + t] = scale * dot(q[g], keys[t]) for tokens [first, last) of keys
  // [length, dim]; q [queries, dim]. A token's bits are the same in any span of them that begins at a
  // multiple of kKeysAtOnce, and ends at one or with the last token.
  void (*score)(const float* q, const float* keys, int dim, int queries, int first, int last,
                float scale, float* scores, std::size_t length);

  // out[g] = sum of shares[g][t] * values[t], columns [first, last) of [queries, dim]; shares
  // [queries, length], values [length, dim]. Every column's bits are the same whichever come with it.
  void (*mix)(const float* shares, const float* values, int length, int dim, int queries, int first,
              int last, float* out);

  // x[i] = exp(x[i] - max) / sum.
  void (*softmax)(float* x, int count);
};

// The table that belongs to the kernels in use (kernels.h).
const DecodeKernels& decode_kernels();

}  // namespace fate
