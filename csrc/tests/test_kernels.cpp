// The native core without Python: every instruction set of this machine, odd
// shapes, all precisions, one to many tokens, threads. Memory is exactly as large as promised, so
// that a byte read beyond it is seen.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "record.h"

namespace {

using namespace fate;

void check_linear(Pool& pool, const char* isa, int rows, int cols, int bits, int tokens) {
  const int group = cols % 64 == 0 ? 64 : 32;
  const Record record(rows, cols, group, bits == 2 ? 4 : bits);
  std::vector<float> x(1ul * tokens * cols), bias(rows), y(1ul * tokens * rows, NAN);
  for (float& value : x) value = random_value();
  for (float& value : bias) value = random_value();
  Buffer memory;
  linear(pool, memory, record.place.at(record.bytes.get(), bits == 2), bias.data(), x.data(), tokens,
         y.data());
  const std::vector<double> exact = rounded(x, tokens, cols, group);
  double off = 0, norm = 0;
  for (int t = 0; t < tokens; ++t) {
    for (int r = 0; r < rows; ++r) {
      double want = bias[r];
      for (int c = 0; c < cols; ++c) want += record.weight(r, c, bits) * exact[1ul * t * cols + c];
      off += (y[1ul * t * rows + r] - want) * (y[1ul * t * rows + r] - want);
      norm += want * want;
    }
  }
  // A value midway between two codes may go either way: one code in a group's sum.
  expect(off <= 1e-6 * norm, "linear", isa, rows, cols, 100 * tokens + bits);
}

void check_experts(Pool& pool, const char* isa, int tokens) {
  const int hidden = 96, inner = 160, experts = 5, k = 3;
  std::vector<Record> up, down;
  std::vector<std::unique_ptr<std::uint8_t[]>> records;
  ExpertShape shape{};
  for (int e = 0; e < experts; ++e) {
    up.emplace_back(2 * inner, hidden, 32, 4);
    down.emplace_back(hidden, inner, 32, 4);
    const auto bytes = [](const MatrixPlace& p) { return p.low + 1ul * p.rows * p.cols / 4; };
    const std::size_t first = (bytes(up[e].place) + 63) / 64 * 64, second = bytes(down[e].place);
    records.emplace_back(new std::uint8_t[first + second]);
    std::memcpy(records[e].get(), up[e].bytes.get(), bytes(up[e].place));
    std::memcpy(records[e].get() + first, down[e].bytes.get(), second);
    MatrixPlace moved = down[e].place;
    for (std::size_t* at : {&moved.scale, &moved.zero, &moved.high, &moved.low}) *at += first;
    shape = {up[e].place, moved, true, false, {Act::kSilu, 1.0f, INFINITY, 0.0f, false}, -1, -1};
  }
  std::vector<float> x(1ul * tokens * hidden), weights(1ul * tokens * k);
  std::vector<std::int64_t> ids(1ul * tokens * k);
  for (float& value : x) value = random_value();
  for (float& value : weights) value = std::fabs(random_value());
  for (int t = 0; t < tokens; ++t)
    for (int i = 0; i < k; ++i) ids[1ul * t * k + i] = (t + 2 * i) % experts;
  std::vector<std::vector<float>> out;
  for (const bool reversed : {false, true}) {
    ExpertStep step;
    step.begin(pool, shape, x.data(), tokens, k, ids.data(), weights.data());
    std::vector<Arrived> needed;
    for (int e = 0; e < experts; ++e)
      for (const std::int64_t id : ids)
        if (id == e) { needed.push_back({e, records[e].get(), false}); break; }
    if (reversed)
      for (auto it = needed.rbegin(); it != needed.rend(); ++it) step.run(pool, {*it});
    else
      step.run(pool, needed);
    out.emplace_back(1ul * tokens * hidden, NAN);
    step.finish(pool, out.back().data());
  }
  expect(out[0] == out[1], "the order of arrival shows", isa, tokens);
  double norm = 0;
  for (const float value : out[0]) norm += 1.0 * value * value;
  expect(std::isfinite(norm) && norm > 0, "experts", isa, tokens);
}

// Rows of a matrix that are computed together have the bits that a few of them have alone.
void check_rows(Pool& pool, const char* isa, int rows, int cols, int bits, int tokens) {
  const int group = cols % 64 == 0 ? 64 : 32;
  const Record record(rows, cols, group, bits == 2 ? 4 : bits);
  const Matrix w = record.place.at(record.bytes.get(), bits == 2);
  std::vector<float> x(1ul * tokens * cols), together(1ul * tokens * rows, NAN), apart = together;
  for (float& value : x) value = random_value();
  Buffer memory;
  const std::vector<ActRow> codes = quantize_all(pool, memory, x.data(), tokens, cols, group);
  const std::size_t bytes = (active().gemm_scratch_bytes(cols, group) + 63) / 64 * 64;
  const std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(64, bytes), std::free);
  auto* room = static_cast<std::uint8_t*>(scratch.get());
  active().gemm(w, codes.data(), tokens, 0, rows, together.data(), rows, room);
  const int few = std::max(1, active().row_tile / 2);  // less than what meets a token at once
  for (int r = 0; r < rows; r += few)
    active().gemm(w, codes.data(), tokens, r, std::min(rows, r + few), apart.data(), rows, room);
  expect(together == apart, "rows together show", isa, rows, cols, 100 * tokens + bits);
}

void check_pool() {
  for (const int threads : {1, 2, 7}) {
    Pool pool(threads);
    for (int round = 0; round < 2000; ++round) {
      const int pieces = round % 13;
      std::vector<int> done(pieces, 0);
      pool.run(pieces, [&](int piece, int thread) {
        pool.scratch(thread, 100 + piece)[99] = 1;
        ++done[piece];
      });
      expect(std::accumulate(done.begin(), done.end(), 0) == pieces, "a piece ran not once", "pool",
             threads, round);
      const auto span = [&](int first, int last, int) {
        for (int piece = first; piece < last; ++piece) ++done[piece];
      };
      pool.run_spans(pieces, span);
      pool.post_spans(pieces, span);
      if (round % 2) pool.run(3, [](int, int) {});  // ends what was posted
      if (round % 3) pool.join();
      pool.join();
      expect(done == std::vector<int>(pieces, 3), "a span ran not once", "pool", threads, round);
    }
  }
}

}  // namespace

int main(int count, char** names) {
  expect_best(count > 1 ? names[1] : nullptr);
  check_pool();
  Pool pool(3);
  for (const Kernels* kernels : available()) {
    use(kernels->name);
    for (const int bits : {2, 4, 8})
      for (const auto& [rows, cols] : std::vector<std::pair<int, int>>{
               {1, 32}, {3, 64}, {33, 96}, {70, 160}, {17, 448}, {130, 1056}})
        for (const int tokens : {1, 2, 3, 4, 9}) check_linear(pool, kernels->name, rows, cols, bits, tokens);
    // A tile, a pair, a pair that is not full, more pairs than are unpacked at once (tiles have 4, 8 or
    // 16 rows); wide ones.
    Pool alone(1);
    for (const int bits : {2, 4, 8}) {
      for (const auto& [rows, cols] : std::vector<std::pair<int, int>>{
               {8, 64}, {16, 64}, {9, 64}, {12, 96}, {31, 448}, {24, 128}, {76, 192}, {150, 64}})
        for (const int tokens : {2, 5, 6, 7}) {
          check_linear(alone, kernels->name, rows, cols, bits, tokens);
          check_rows(alone, kernels->name, rows, cols, bits, tokens);
        }
      for (const auto& [rows, cols] :
           std::vector<std::pair<int, int>>{{44, 5632}, {28, 9216}, {12, 18432}}) {
        check_linear(alone, kernels->name, rows, cols, bits, 6);
        check_rows(alone, kernels->name, rows, cols, bits, 6);
      }
    }
    for (const int tokens : {1, 2, 40}) check_experts(pool, kernels->name, tokens);
    std::printf("%s: tried\n", kernels->name);
  }
  std::printf(failures ? "%d failures\n" : "all as it should be\n", failures);
  return failures ? 1 : 0;
}
