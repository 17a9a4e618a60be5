// What does a kernel know of a record? Addresses and lengths; never tensors, files or Python.
//
// Helpers here are `static`: every instruction set compiles its own, and the linker must not pick
// the one of a wider set for all.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fate {

// One quantized matrix [rows, cols] inside a record. Weight = (code - zero) * scale.
// bits 4: code = 4 * high + low, two planes; bits 2: the high plane alone, its scale and zero
// derived as in quant/codec.py; bits 8: `high` holds the codes, row-major.
// Planes: a group of G weights is G/4 bytes; byte j holds weights j, j+G/4, j+2G/4, j+3G/4 at
// bits 0, 2, 4, 6 (quant/record.py).
struct Matrix {
  const std::uint16_t* scale;  // fp16 [rows, groups]
  const std::uint16_t* zero;   // fp16 [rows, groups]
  const std::uint8_t* high;
  const std::uint8_t* low;
  int rows;
  int cols;
  int group;  // 64 or 32
  int bits;   // 8, 4 or 2
  int groups() const { return cols / group; }
};

// Activations of one token, int8 per group of the matrix they will meet: x ~ code * scale.
// Padded with zeros to a whole number of kPadGroups groups, so that kernels may read past the end.
struct ActRow {
  const std::int8_t* codes;  // [padded groups * group]
  const float* scale;        // [padded groups]
  const float* sum;          // sum of the codes of a group, [padded groups]
};

constexpr int kPadGroups = 16;  // the widest superblock: 16 float lanes of AVX-512

static inline int padded_groups(int groups) {
  return (groups + kPadGroups - 1) / kPadGroups * kPadGroups;
}

// Bytes of one ActRow's storage; codes first, then scales, then sums.
static inline std::size_t act_row_bytes(int cols, int group) {
  const std::size_t groups = padded_groups(cols / group);
  return groups * group + 2 * groups * sizeof(float);
}

static inline ActRow act_row_at(const std::uint8_t* base, int cols, int group) {
  const std::size_t groups = padded_groups(cols / group);
  const auto* scale = reinterpret_cast<const float*>(base + groups * group);
  return {reinterpret_cast<const std::int8_t*>(base), scale, scale + groups};
}

}  // namespace fate
