// Which kernels are there, and which does this processor run?
//
// One table per instruction set, all made from kernels.inl; `active` is chosen once, at run time.
#pragma once

#include <vector>

#include "matrix.h"

namespace fate {

// What stands between an expert's two matrices.
enum class Act : int { kSilu, kGelu, kGeluTanh, kRelu, kRelu2, kClampedSwiGlu };

struct Kernels {
  const char* name;
  int row_tile;  // rows that `gemm` works on at once; chunks of rows should be multiples of it

  // Quantize one token to int8 per group into the storage `out` (act_row_bytes, 64-byte aligned).
  // `lanes`: in the order `gemv` wants for planes; otherwise in natural order.
  void (*quantize)(const float* x, int cols, int group, bool lanes, std::uint8_t* out);

  // y[r - first] = dot(row r, x) for rows [first, last). Activations: lanes order for 4 and 2 bits,
  // natural for 8.
  void (*gemv)(const Matrix& w, const ActRow& x, int first, int last, float* y);

  // y[t * stride + r] = dot(row r, x[t]) for rows [first, last) and tokens [0, tokens).
  // Activations in natural order. `scratch`: gemm_scratch_bytes, 64-byte aligned.
  void (*gemm)(const Matrix& w, const ActRow* x, int tokens, int first, int last, float* y,
               std::size_t stride, std::uint8_t* scratch);
  std::size_t (*gemm_scratch_bytes)(int cols, int group);

  // out[i] = act(gate[i * stride]) * up[i * stride], without `up` when it is null. kClampedSwiGlu:
  // min(gate, limit) * sigmoid(alpha * gate) * (clamp(up, +-limit) + 1), as gpt-oss computes it.
  void (*activate)(Act act, const float* gate, const float* up, int stride, int count, float alpha,
                   float limit, float* out);
};

// Tables that this build holds and this processor can run, best first; the last is portable.
const std::vector<const Kernels*>& available();

const Kernels& active();
bool use(const char* name);  // false: there is none of that name

}  // namespace fate
