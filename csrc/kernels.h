// Which kernels are there, and which does this processor run?
//
// One table per instruction set, all made from kernels.inl; `active` is chosen once, at run time.
#pragma once

#include <vector>

#include "matrix.h"

namespace fate {

// What stands between an expert's two matrices: act(min(gate, limit)) * (clamp(up, +-limit) + offset),
// or the limit after the activation. Without a gate: act(up).
enum class Act : int { kSilu, kGelu, kGeluTanh, kRelu, kRelu2 };

struct Gate {
  Act act;
  float alpha;   // silu is x * sigmoid(alpha * x)
  float limit;   // infinity: none
  float offset;
  bool limit_after;
};

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

  // out[i] from gate[i * stride] and up[i * stride]; `up` is null where there is no gate.
  void (*activate)(const Gate& form, const float* gate, const float* up, int stride, int count,
                   float* out);
};

// Tables that this build holds and this processor can run, best first; the last is portable.
const std::vector<const Kernels*>& available();

const Kernels& active();
bool use(const char* name);  // false: there is none of that name

}  // namespace fate
