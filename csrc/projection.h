// How do several products of one token with the same input become one piece of work?
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "feedforward.h"

namespace fate {

// y = W x + bias for one token; W is a record, else floats, else bfloat16 [rows, cols]: what is not
// null.
struct Projection {
  MatrixPlace place;
  const std::uint8_t* record;
  const float* weight;
  const std::uint16_t* bfloats;
  const float* bias;  // may be null
};

struct Product {
  const Projection* matrix;
  float* y;
};

// At most three products with one x. The rows are shared out in pieces; calling it with a span of
// pieces computes them.
class Products {
 public:
  // Take over what to compute and round x, both of which must stay until all pieces are done.
  void prepare(const float* x, std::initializer_list<Product> products);

  int pieces() const { return starts_[count_]; }
  bool is_worth_sharing() const { return weights_ >= kWorthSharing; }
  void operator()(int from, int to, int thread) const;

  // All pieces on all cores where that is worth waking them.
  void run(Pool& pool) const;

  static constexpr std::size_t kWorthSharing = 1 << 16;  // weights, or floats that are read

 private:
  static constexpr int kMost = 3;

  Product products_[kMost] = {};
  ActRow codes_[kMost] = {};
  Buffer memory_[kMost];
  int starts_[kMost + 1] = {};
  int count_ = 0;
  std::size_t weights_ = 0;
  const float* x_ = nullptr;
};

// y [tokens, rows] = x W^T + bias for tokens x [tokens, cols], of bfloat16 or, one token, of floats.
void project(Pool& pool, const Projection& matrix, const float* x, int tokens, float* y);

}  // namespace fate
