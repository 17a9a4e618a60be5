// The vector unit that every processor has: 128 bits of plain C++.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "half.h"

namespace fate {

struct Portable {
  static constexpr int W = 1;  // 128-bit lanes
  static constexpr int kTall = 1;  // tiles that a token meets at once
  static constexpr bool kWide = true;  // sums of steps have 32 bits; otherwise 16, begun by `first`
  static constexpr const char* name = "portable";
  struct I { std::uint8_t b[16]; };
  struct I32 { std::int32_t v[4]; };
  struct F { float v[4]; };
  using P = I32;  // a partial sum of products

  static I load(const void* p) { I r; std::memcpy(&r, p, 16); return r; }
  static void store(void* p, I a) { std::memcpy(p, &a, 16); }
  static I gather(const std::uint8_t* const* lanes) { return load(lanes[0]); }
  static I low_pairs(I h, I l) {  // (h & 0x33) << 2 | (l & 0x33)
    I r;
    for (int i = 0; i < 16; ++i)
      r.b[i] = static_cast<std::uint8_t>((h.b[i] & 0x33) << 2 | (l.b[i] & 0x33));
    return r;
  }
  static I high_pairs(I h, I l) {  // (h & 0xcc) | (l & 0xcc) >> 2
    I r;
    for (int i = 0; i < 16; ++i)
      r.b[i] = static_cast<std::uint8_t>((h.b[i] & 0xcc) | (l.b[i] & 0xcc) >> 2);
    return r;
  }
  static I nibble0(I a) { for (auto& b : a.b) b &= 15; return a; }
  static I nibble1(I a) { for (auto& b : a.b) b >>= 4; return a; }
  template <int N> static I pair(I a) { for (auto& b : a.b) b = (b >> 2 * N) & 3; return a; }
  static void transpose4(const I* in, I* out) {  // 4x4 of 4-byte elements
    for (int r = 0; r < 4; ++r)
      for (int d = 0; d < 4; ++d) std::memcpy(out[d].b + 4 * r, in[r].b + 4 * d, 4);
  }
  static I broadcast4(const std::int8_t* p) {
    I r;
    for (int i = 0; i < 4; ++i) std::memcpy(r.b + 4 * i, p, 4);
    return r;
  }
  static P p_zero() { return {{0, 0, 0, 0}}; }
  static P step(P acc, I w, I a) {  // w unsigned, a signed
    for (int i = 0; i < 16; ++i)
      acc.v[i / 4] += static_cast<int>(w.b[i]) * static_cast<std::int8_t>(a.b[i]);
    return acc;
  }
  static void step_into(P& acc, I w, I a) { acc = step(acc, w, a); }
  static I32 flush(I32 sum, P p) { for (int i = 0; i < 4; ++i) sum.v[i] += p.v[i]; return sum; }
  static I32 i_zero() { return {{0, 0, 0, 0}}; }
  static constexpr int kOffset8 = 0;
  static I32 step8(I32 acc, I w, I a) { return step(acc, w, a); }
  static void step8_into(I32& acc, I w, I a) { acc = step8(acc, w, a); }
  static F to_float(I32 a) { F r; for (int i = 0; i < 4; ++i) r.v[i] = static_cast<float>(a.v[i]); return r; }
  static F f_zero() { return {{0, 0, 0, 0}}; }
  static F f_load(const float* p) { F r; std::memcpy(&r, p, 16); return r; }
  static void f_store(float* p, F a) { std::memcpy(p, &a, 16); }
  static F f_set(float x) { return {{x, x, x, x}}; }
  static F f_half(const std::uint16_t* p) { F r; for (int i = 0; i < 4; ++i) r.v[i] = half_to_float(p[i]); return r; }
  static F f_bfloat(const std::uint16_t* p) {
    F r;
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t bits = static_cast<std::uint32_t>(p[i]) << 16;
      std::memcpy(&r.v[i], &bits, sizeof bits);
    }
    return r;
  }
  static F mul(F a, F b) { for (int i = 0; i < 4; ++i) a.v[i] *= b.v[i]; return a; }
  static F add(F a, F b) { for (int i = 0; i < 4; ++i) a.v[i] += b.v[i]; return a; }
  static F sub(F a, F b) { for (int i = 0; i < 4; ++i) a.v[i] -= b.v[i]; return a; }
  static F fma(F a, F b, F c) { for (int i = 0; i < 4; ++i) c.v[i] += a.v[i] * b.v[i]; return c; }
  static float fma(float a, float b, float c) { return c + a * b; }
  using Index = I32;
  static Index index(const std::int32_t* p) { I32 r; std::memcpy(&r, p, 16); return r; }
  static F permute(F a, Index at) { F r; for (int i = 0; i < 4; ++i) r.v[i] = a.v[at.v[i]]; return r; }
  static float sum(F a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
};

}  // namespace fate
