// 128-bit NEON with the dot product instructions (ARMv8.2): Apple M1, Graviton 2 and later.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace fate {

struct Neon {
  static constexpr int W = 1;
  static constexpr int kTall = 2;  // tiles that a token meets at once
  static constexpr bool kWide = true;  // sums of steps have 32 bits; otherwise 16, begun by `first`
  static constexpr const char* name = "neon-dotprod";
  using I = uint8x16_t;
  using I32 = int32x4_t;
  using F = float32x4_t;
  using P = int32x4_t;

  static I load(const void* p) { return vld1q_u8(static_cast<const std::uint8_t*>(p)); }
  static void store(void* p, I a) { vst1q_u8(static_cast<std::uint8_t*>(p), a); }
  static I gather(const std::uint8_t* const* lanes) { return load(lanes[0]); }
  static I low_pairs(I h, I l) {
    const I m = vdupq_n_u8(0x33);
    return vorrq_u8(vshlq_n_u8(vandq_u8(h, m), 2), vandq_u8(l, m));
  }
  static I high_pairs(I h, I l) {
    const I m = vdupq_n_u8(0xcc);
    return vorrq_u8(vandq_u8(h, m), vshrq_n_u8(vandq_u8(l, m), 2));
  }
  static I nibble0(I a) { return vandq_u8(a, vdupq_n_u8(15)); }
  static I nibble1(I a) { return vshrq_n_u8(a, 4); }
  template <int N> static I pair(I a) {
    if constexpr (N == 0) return vandq_u8(a, vdupq_n_u8(3));
    else return vandq_u8(vshrq_n_u8(a, 2 * N), vdupq_n_u8(3));
  }
  static void transpose4(const I* in, I* out) {
    const uint32x4x2_t ab = vtrnq_u32(vreinterpretq_u32_u8(in[0]), vreinterpretq_u32_u8(in[1]));
    const uint32x4x2_t cd = vtrnq_u32(vreinterpretq_u32_u8(in[2]), vreinterpretq_u32_u8(in[3]));
    for (int odd = 0; odd < 2; ++odd) {
      const uint64x2_t p = vreinterpretq_u64_u32(ab.val[odd]), q = vreinterpretq_u64_u32(cd.val[odd]);
      out[odd] = vreinterpretq_u8_u64(vcombine_u64(vget_low_u64(p), vget_low_u64(q)));
      out[odd + 2] = vreinterpretq_u8_u64(vcombine_u64(vget_high_u64(p), vget_high_u64(q)));
    }
  }
  static I broadcast4(const std::int8_t* p) {
    return vreinterpretq_u8_u32(vld1q_dup_u32(reinterpret_cast<const std::uint32_t*>(p)));
  }
  static P p_zero() { return vdupq_n_s32(0); }
  static P step(P acc, I w, I a) {  // codes up to 15 are the same signed and unsigned
    return vdotq_s32(acc, vreinterpretq_s8_u8(w), vreinterpretq_s8_u8(a));
  }
  static void step_into(P& acc, I w, I a) { acc = step(acc, w, a); }
  static I32 flush(I32 sum, P p) { return vaddq_s32(sum, p); }
  static I32 i_zero() { return vdupq_n_s32(0); }
  static constexpr int kOffset8 = 128;
  static I32 step8(I32 acc, I w, I a) { return step(acc, veorq_u8(w, vdupq_n_u8(0x80)), a); }
  static void step8_into(I32& acc, I w, I a) { acc = step8(acc, w, a); }
  static F to_float(I32 a) { return vcvtq_f32_s32(a); }
  static F f_zero() { return vdupq_n_f32(0); }
  static F f_load(const float* p) { return vld1q_f32(p); }
  static void f_store(float* p, F a) { vst1q_f32(p, a); }
  static F f_set(float x) { return vdupq_n_f32(x); }
  static F f_half(const std::uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static F f_bfloat(const std::uint16_t* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
  }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  using Index = uint8x16_t;  // byte numbers for a table lookup
  static Index index(const std::int32_t* p) {
    const uint32x4_t first = vmulq_n_u32(vreinterpretq_u32_s32(vld1q_s32(p)), 0x04040404u);
    return vreinterpretq_u8_u32(vaddq_u32(first, vdupq_n_u32(0x03020100u)));
  }
  static F permute(F a, Index at) {
    return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(a), at));
  }
  static float sum(F a) { return vaddvq_f32(a); }
};

}  // namespace fate
