#include "feedforward.h"

#include <algorithm>
#include <cstring>

namespace fate {
namespace {

constexpr int kGemvRows = 32;     // rows a core claims at least for one token
constexpr int kManyTokens = 16;   // from here on, sums over tokens are worth sharing out

int pieces_of(int count, int size) { return (count + size - 1) / size; }

bool in_lanes(const Matrix& w) { return w.bits != 8; }

// Share out the rows of `count` matrices of `rows` each, for one token: work(matrix, first, last).
template <class Work> void each_matrix(Pool& pool, int count, int rows, const Work& work) {
  const int pieces = pieces_of(rows, kGemvRows);
  pool.run_spans(count * pieces, [&](int from, int to, int) {
    for (int piece = from; piece < to;) {
      const int matrix = piece / pieces, end = std::min(to, (matrix + 1) * pieces);
      work(matrix, piece % pieces * kGemvRows,
           std::min(rows, (end - matrix * pieces) * kGemvRows));
      piece = end;
    }
  });
}

// Share out the rows of a matrix for many tokens, tile by tile; `after` gets the rows that are done.
template <class After>
void each_tile(Pool& pool, const Matrix& w, const ActRow* x, int tokens, float* y,
               std::size_t stride, const After& after) {
  const int tile = active().row_tile;
  pool.run_spans(pieces_of(w.rows, tile), [&](int from, int to, int thread) {
    const int first = from * tile, last = std::min(w.rows, to * tile);
    std::uint8_t* scratch = pool.scratch(thread, active().gemm_scratch_bytes(w.cols, w.group));
    active().gemm(w, x, tokens, first, last, y, stride, scratch);
    after(first, last);
  });
}

}  // namespace

std::vector<ActRow> quantize_all(Pool& pool, Buffer& memory, const float* x, int tokens, int cols,
                                 int group) {
  const std::size_t bytes = (act_row_bytes(cols, group) + 63) / 64 * 64;
  std::uint8_t* base = memory.get(bytes * tokens);
  pool.run(pieces_of(tokens, 8), [&](int piece, int) {
    for (int t = 8 * piece; t < std::min(tokens, 8 * piece + 8); ++t)
      active().quantize(x + static_cast<std::size_t>(t) * cols, cols, group, false,
                        base + bytes * t);
  });
  std::vector<ActRow> rows(tokens);
  for (int t = 0; t < tokens; ++t) rows[t] = act_row_at(base + bytes * t, cols, group);
  return rows;
}

void multiply(Pool& pool, const Matrix& w, const float* bias, const std::vector<ActRow>& x,
              float* y) {
  const int tokens = static_cast<int>(x.size());
  each_tile(pool, w, x.data(), tokens, y, w.rows, [&](int first, int last) {
    if (bias == nullptr) return;
    for (int t = 0; t < tokens; ++t)
      for (int r = first; r < last; ++r) y[static_cast<std::size_t>(t) * w.rows + r] += bias[r];
  });
}

void linear(Pool& pool, Buffer& memory, const Matrix& w, const float* bias, const float* x,
            int tokens, float* y) {
  const auto add_bias = [&](float* row, int first, int last) {
    if (bias != nullptr)
      for (int r = first; r < last; ++r) row[r] += bias[r];
  };
  if (tokens == 1) {
    std::uint8_t* codes = memory.get(act_row_bytes(w.cols, w.group));
    active().quantize(x, w.cols, w.group, in_lanes(w), codes);
    const ActRow row = act_row_at(codes, w.cols, w.group);
    pool.run_spans(pieces_of(w.rows, kGemvRows), [&](int from, int to, int) {
      const int first = from * kGemvRows, last = std::min(w.rows, to * kGemvRows);
      active().gemv(w, row, first, last, y + first);
      add_bias(y, first, last);
    });
    return;
  }
  multiply(pool, w, bias, quantize_all(pool, memory, x, tokens, w.cols, w.group), y);
}

void ExpertStep::begin(Pool& pool, const ExpertShape& shape, const float* x, int tokens, int k,
                       const std::int64_t* ids, const float* weights) {
  shape_ = shape;
  x_ = x;
  tokens_ = tokens;
  k_ = k;
  ids_ = ids;
  weights_ = weights;
  const std::size_t floats = static_cast<std::size_t>(tokens) * k * shape.down.rows;
  std::memset(parts_.floats(floats), 0, 4 * floats);
  const std::size_t bytes = (act_row_bytes(shape.up.cols, shape.up.group) + 63) / 64 * 64;
  if (tokens == 1) {
    active().quantize(x, shape.up.cols, shape.up.group, shape.up.bits != 8, quantized_.get(bytes));
  } else {
    quantize_all(pool, quantized_, x, tokens, shape.up.cols, shape.up.group);
  }
}

void ExpertStep::run(Pool& pool, const std::vector<Arrived>& arrived) {
  if (tokens_ == 1) return run_one_token(pool, arrived);
  for (const Arrived& expert : arrived) run_many_tokens(pool, expert);
}

void ExpertStep::finish(Pool& pool, float* out) {
  const std::size_t width = shape_.down.rows;
  const float* parts = parts_.floats(static_cast<std::size_t>(tokens_) * k_ * width);
  const int size = tokens_ < kManyTokens ? tokens_ : pieces_of(tokens_, pool.threads());
  pool.run(pieces_of(tokens_, size), [&](int piece, int) {
    for (int t = size * piece; t < std::min(tokens_, size * piece + size); ++t) {
      float* sum = out + t * width;
      const float* first = parts + t * k_ * width;
      std::memcpy(sum, first, 4 * width);
      for (int k = 1; k < k_; ++k)
        for (std::size_t d = 0; d < width; ++d) sum[d] += first[k * width + d];
    }
  });
}

std::vector<ExpertStep::Choice> ExpertStep::choices(std::int64_t expert) const {
  std::vector<Choice> found;
  for (int t = 0; t < tokens_; ++t) {
    const std::int64_t* ids = ids_ + static_cast<std::size_t>(t) * k_;
    for (int k = 0; k < k_; ++k) {
      if (ids[k] != expert) continue;
      int place = 0;  // its rank in the token's ids: the order of the sum
      for (int other = 0; other < k_; ++other) place += ids[other] < expert;
      found.push_back({t, place, weights_[static_cast<std::size_t>(t) * k_ + k]});
    }
  }
  return found;
}

float* ExpertStep::part(const Choice& choice) {
  const std::size_t width = shape_.down.rows;
  float* parts = parts_.floats(static_cast<std::size_t>(tokens_) * k_ * width);
  return parts + (static_cast<std::size_t>(choice.token) * k_ + choice.place) * width;
}

const float* ExpertStep::bias(const Arrived& expert, std::int64_t offset) const {
  return offset < 0 ? nullptr : reinterpret_cast<const float*>(expert.record + offset);
}

void ExpertStep::inner(const float* h, float* out) const {
  const int width = shape_.down.cols;
  const float* up = !shape_.gated ? nullptr : shape_.interleaved ? h + 1 : h + width;
  active().activate(shape_.form, h, up, shape_.gated && shape_.interleaved ? 2 : 1, width, out);
}

void ExpertStep::run_one_token(Pool& pool, const std::vector<Arrived>& arrived) {
  const int count = static_cast<int>(arrived.size());
  const int up_rows = shape_.up.rows, down_rows = shape_.down.rows, width = shape_.down.cols;
  const ActRow x = act_row_at(quantized_.get(act_row_bytes(shape_.up.cols, shape_.up.group)),
                              shape_.up.cols, shape_.up.group);
  float* h = between_.floats(static_cast<std::size_t>(count) * up_rows);
  each_matrix(pool, count, up_rows, [&](int e, int first, int last) {
    float* y = h + static_cast<std::size_t>(e) * up_rows;
    active().gemv(shape_.up.at(arrived[e].record, arrived[e].head_only), x, first, last, y + first);
    if (const float* add = bias(arrived[e], shape_.up_bias))
      for (int r = first; r < last; ++r) y[r] += add[r];
  });
  const std::size_t bytes = (act_row_bytes(width, shape_.down.group) + 63) / 64 * 64;
  std::uint8_t* codes = inner_.get(bytes * count);
  pool.run(count, [&](int e, int thread) {
    auto* values = reinterpret_cast<float*>(pool.scratch(thread, 4 * static_cast<std::size_t>(width)));
    inner(h + static_cast<std::size_t>(e) * up_rows, values);
    active().quantize(values, width, shape_.down.group, shape_.down.bits != 8, codes + bytes * e);
  });
  std::vector<Choice> chosen;
  for (const Arrived& expert : arrived) chosen.push_back(choices(expert.expert).front());
  each_matrix(pool, count, down_rows, [&](int e, int first, int last) {
    float* y = part(chosen[e]);
    active().gemv(shape_.down.at(arrived[e].record, arrived[e].head_only),
                  act_row_at(codes + bytes * e, width, shape_.down.group), first, last, y + first);
    const float* add = bias(arrived[e], shape_.down_bias);
    for (int r = first; r < last; ++r) y[r] = (y[r] + (add ? add[r] : 0.0f)) * chosen[e].weight;
  });
}

void ExpertStep::run_many_tokens(Pool& pool, const Arrived& expert) {
  const std::vector<Choice> chosen = choices(expert.expert);
  const int count = static_cast<int>(chosen.size());
  const int width = shape_.down.cols;
  const std::size_t up_rows = shape_.up.rows, down_rows = shape_.down.rows;
  const std::size_t x_bytes = (act_row_bytes(shape_.up.cols, shape_.up.group) + 63) / 64 * 64;
  const std::uint8_t* quantized = quantized_.get(x_bytes * tokens_);
  std::vector<ActRow> x(count), between(count);
  for (int i = 0; i < count; ++i)
    x[i] = act_row_at(quantized + x_bytes * chosen[i].token, shape_.up.cols, shape_.up.group);

  const Matrix up = shape_.up.at(expert.record, expert.head_only);
  float* h = between_.floats(count * up_rows);
  const float* up_bias = bias(expert, shape_.up_bias);
  each_tile(pool, up, x.data(), count, h, up_rows, [&](int first, int last) {
    if (up_bias != nullptr)
      for (int i = 0; i < count; ++i)
        for (int r = first; r < last; ++r) h[i * up_rows + r] += up_bias[r];
  });

  const std::size_t bytes = (act_row_bytes(width, shape_.down.group) + 63) / 64 * 64;
  std::uint8_t* codes = inner_.get(bytes * count);
  const int share = pieces_of(count, 2 * pool.threads());
  pool.run(pieces_of(count, share), [&](int piece, int thread) {
    auto* values = reinterpret_cast<float*>(pool.scratch(thread, 4 * static_cast<std::size_t>(width)));
    for (int i = piece * share; i < std::min(count, piece * share + share); ++i) {
      inner(h + i * up_rows, values);
      active().quantize(values, width, shape_.down.group, false, codes + bytes * i);
    }
  });
  for (int i = 0; i < count; ++i)
    between[i] = act_row_at(codes + bytes * i, width, shape_.down.group);

  const Matrix down = shape_.down.at(expert.record, expert.head_only);
  float* y = results_.floats(count * down_rows);
  const float* down_bias = bias(expert, shape_.down_bias);
  each_tile(pool, down, between.data(), count, y, down_rows, [&](int first, int last) {
    for (int i = 0; i < count; ++i) {
      const float* from = y + i * down_rows;
      float* to = part(chosen[i]);
      for (int r = first; r < last; ++r)
        to[r] = (from[r] + (down_bias ? down_bias[r] : 0.0f)) * chosen[i].weight;
    }
  });
}

}  // namespace fate
