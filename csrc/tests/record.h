// What the C++ tests share: counting failures, random numbers, a record in memory that ends where it
// ends.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "feedforward.h"
#include "half.h"

namespace fate {

inline int failures = 0;

inline void expect(bool good, const char* what, const char* isa, int a = 0, int b = 0, int c = 0) {
  if (good) return;
  ++failures;
  std::printf("FAILED: %s (%s; %d, %d, %d)\n", what, isa, a, b, c);
}

// Or a processor that is taken for another one would have its tests pass, all of them portable.
inline void expect_best(const char* name) {
  if (name != nullptr) expect(std::strcmp(active().name, name) == 0, "not the best there is", active().name);
}

inline std::mt19937 random_bits(7);

inline float random_value() { return std::normal_distribution<float>(0, 1)(random_bits); }

// A record of one matrix with random codes, in memory that ends where it ends.
struct Record {
  MatrixPlace place;
  std::unique_ptr<std::uint8_t[]> bytes;

  Record(int rows, int cols, int group, int bits) {
    const std::size_t meta = 2ul * rows * (cols / group), plane = 1ul * rows * cols / 4;
    const std::size_t codes = bits == 8 ? 4 * plane : plane;
    place = {rows, cols, group, bits, 0, meta, 2 * meta, bits == 8 ? 2 * meta : 2 * meta + plane};
    const std::size_t size = 2 * meta + (bits == 8 ? codes : 2 * plane);
    bytes.reset(new std::uint8_t[size]);
    for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<std::uint8_t>(random_bits());
    auto* scale = reinterpret_cast<std::uint16_t*>(bytes.get());
    for (std::size_t i = 0; i < meta / 2; ++i) {
      scale[i] = static_cast<std::uint16_t>(0x1c00 + random_bits() % 0x400);           // 0.004 ..
      scale[meta / 2 + i] = static_cast<std::uint16_t>(0x4400 + random_bits() % 0x800);  // 4 to 16
    }
  }

  double weight(int row, int col, int bits) const {
    const Matrix w = place.at(bytes.get());
    const int groups = w.groups(), group = w.group, g = col / group, i = col % group;
    double scale = half_to_float(w.scale[row * groups + g]);
    double zero = half_to_float(w.zero[row * groups + g]);
    if (place.bits == 8) return (w.high[1ul * row * w.cols + col] - zero) * scale;
    const std::size_t at = 1ul * row * w.cols / 4 + 1ul * g * group / 4 + i % (group / 4);
    const int shift = 2 * (i / (group / 4));
    const int high = w.high[at] >> shift & 3;
    if (bits == 2) return (high - (zero - 1.5) / 4) * scale * 4;
    return (4 * high + (w.low[at] >> shift & 3) - zero) * scale;
  }
};

// x [tokens, cols] as kernels round it: to eight bits by groups.
inline std::vector<double> rounded(const std::vector<float>& x, int tokens, int cols, int group) {
  std::vector<double> out(x.size());
  for (std::size_t from = 0; from < 1ul * tokens * cols; from += group) {
    float most = 0;
    for (int i = 0; i < group; ++i) most = std::max(most, std::fabs(x[from + i]));
    for (int i = 0; i < group; ++i)
      out[from + i] = std::nearbyint(x[from + i] * (127.0f / most)) * (most / 127.0f);
  }
  return out;
}

}  // namespace fate
