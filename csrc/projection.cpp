#include "projection.h"

#include <algorithm>

#include "decode.h"

namespace fate {
namespace {

constexpr int kRowsAtOnce = 32;  // rows a core claims at least

// Whether two records want the same codes of an input.
bool alike(const Projection& a, const Projection& b) {
  return a.record != nullptr && b.record != nullptr && a.place.group == b.place.group &&
         (a.place.bits == 8) == (b.place.bits == 8);
}

void rows_of(const Product& product, const ActRow& codes, const float* x, int first, int last) {
  const Projection& w = *product.matrix;
  if (w.record != nullptr) {
    active().gemv(w.place.at(w.record), codes, first, last, product.y + first);
  } else if (w.bfloats != nullptr) {
    decode_kernels().gemm(w.bfloats, x, w.place.cols, 1, first, last, product.y, w.place.rows);
  } else {
    decode_kernels().gemv(w.weight, x, w.place.cols, first, last, product.y + first);
  }
  if (w.bias != nullptr)
    for (int r = first; r < last; ++r) product.y[r] += w.bias[r];
}

}  // namespace

void Products::prepare(const float* x, std::initializer_list<Product> products) {
  x_ = x;
  count_ = 0;
  weights_ = 0;
  for (const Product& product : products) {
    const MatrixPlace& place = product.matrix->place;
    products_[count_] = product;
    if (count_ > 0 && alike(*products_[count_ - 1].matrix, *product.matrix)) {
      codes_[count_] = codes_[count_ - 1];
    } else if (product.matrix->record != nullptr) {
      std::uint8_t* bytes = memory_[count_].get(act_row_bytes(place.cols, place.group));
      active().quantize(x, place.cols, place.group, place.bits != 8, bytes);
      codes_[count_] = act_row_at(bytes, place.cols, place.group);
    }
    weights_ += static_cast<std::size_t>(place.rows) * place.cols;
    starts_[count_ + 1] = starts_[count_] + (place.rows + kRowsAtOnce - 1) / kRowsAtOnce;
    ++count_;
  }
}

void Products::operator()(int from, int to, int) const {
  for (int which = 0; which < count_; ++which) {
    const Product& product = products_[which];
    const int first = std::max(from - starts_[which], 0) * kRowsAtOnce;
    const int last = std::min((to - starts_[which]) * kRowsAtOnce, product.matrix->place.rows);
    if (first < last) rows_of(product, codes_[which], x_, first, last);
  }
}

void Products::run(Pool& pool) const {
  if (!is_worth_sharing()) return (*this)(0, pieces(), 0);
  pool.run_spans(pieces(), *this);
}

void project(Pool& pool, const Projection& matrix, const float* x, int tokens, float* y) {
  if (tokens == 1) {
    Products products;
    products.prepare(x, {{&matrix, y}});
    return products.run(pool);
  }
  const int rows = matrix.place.rows;
  const std::size_t stride = rows;
  pool.run_spans((rows + kRowsAtOnce - 1) / kRowsAtOnce, [&](int from, int to, int) {
    const int first = from * kRowsAtOnce, last = std::min(to * kRowsAtOnce, rows);
    decode_kernels().gemm(matrix.bfloats, x, matrix.place.cols, tokens, first, last, y, stride);
    if (matrix.bias != nullptr)
      for (int t = 0; t < tokens; ++t)
        for (int r = first; r < last; ++r) y[t * stride + r] += matrix.bias[r];
  });
}

}  // namespace fate
