// What is computed for one MoE layer, and for one resident matrix, from their records?
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace fate {

// Where a matrix lies in a record; offsets in bytes.
struct MatrixPlace {
  int rows, cols, group, bits;
  std::size_t scale, zero, high, low;

  Matrix at(const std::uint8_t* record, bool head_only = false) const {
    return {reinterpret_cast<const std::uint16_t*>(record + scale),
            reinterpret_cast<const std::uint16_t*>(record + zero),
            record + high, record + low, rows, cols, group, head_only ? 2 : bits};
  }
};

// Memory that grows and is kept, 64-byte aligned.
class Buffer {
 public:
  std::uint8_t* get(std::size_t bytes) {
    if (bytes_.size() < bytes + 64) bytes_.resize(bytes + 64);
    const auto address = reinterpret_cast<std::uintptr_t>(bytes_.data());
    return bytes_.data() + (64 - address % 64) % 64;
  }
  float* floats(std::size_t count) { return reinterpret_cast<float*>(get(4 * count)); }

 private:
  std::vector<std::uint8_t> bytes_;
};

// y[t, r] = sum_c x[t, c] w[r, c] + bias[r]. bias may be null. y: [tokens, rows].
void linear(Pool& pool, Buffer& memory, const Matrix& w, const float* bias, const float* x,
            int tokens, float* y);

// Round tokens [tokens, cols] to int8 in natural order; they lie in `memory`.
std::vector<ActRow> quantize_all(Pool& pool, Buffer& memory, const float* x, int tokens, int cols,
                                 int group);

// y [tokens, rows] = x W^T + bias, for tokens that are rounded; `bias` may be null.
void multiply(Pool& pool, const Matrix& w, const float* bias, const std::vector<ActRow>& x,
              float* y);

struct ExpertShape {
  MatrixPlace up;    // [2F, D], or [F, D] without a gate
  MatrixPlace down;  // [D, F]
  bool gated;
  bool interleaved;  // gate and up rows alternate; otherwise all gates come first
  Gate form;
  std::int64_t up_bias, down_bias;  // byte offsets in the record, -1: none
};

struct Arrived {
  std::int64_t expert;
  const std::uint8_t* record;
  bool head_only;  // compute from the INT2 head
};

// The routed experts of one step of one layer: begin, run for whatever has arrived, finish.
class ExpertStep {
 public:
  // x [tokens, D], ids and weights [tokens, k]; all must stay until `finish`.
  void begin(Pool& pool, const ExpertShape& shape, const float* x, int tokens, int k,
             const std::int64_t* ids, const float* weights);
  void run(Pool& pool, const std::vector<Arrived>& arrived);
  // out [tokens, D]: the weighted parts, summed in ascending expert id.
  void finish(Pool& pool, float* out);

 private:
  struct Choice { int token; int place; float weight; };

  void run_one_token(Pool& pool, const std::vector<Arrived>& arrived);
  void run_many_tokens(Pool& pool, const Arrived& expert);
  std::vector<Choice> choices(std::int64_t expert) const;
  void inner(const float* h, float* out) const;
  const float* bias(const Arrived& expert, std::int64_t offset) const;
  float* part(const Choice& choice);

  ExpertShape shape_{};
  const float* x_ = nullptr;
  const std::int64_t* ids_ = nullptr;
  const float* weights_ = nullptr;
  int tokens_ = 0, k_ = 0;
  Buffer quantized_, between_, inner_, parts_, results_;
};

}  // namespace fate
