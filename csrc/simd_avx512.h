// 512-bit AVX-512 (F, BW, VL, DQ) with VNNI: Intel since Ice Lake, AMD since Zen 4.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace fate {

struct Avx512 {
  static constexpr int W = 4;
  static constexpr int kTall = 2;  // tiles that a token meets at once
  static constexpr bool kWide = true;  // sums of steps have 32 bits; otherwise 16, begun by `first`
  static constexpr const char* name = "avx512-vnni";
  using I = __m512i;
  using I32 = __m512i;
  using F = __m512;
  using P = __m512i;

  static I load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, I a) { _mm512_storeu_si512(p, a); }
  static I gather(const std::uint8_t* const* lanes) {
    const auto lane = [&](int i) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(lanes[i]));
    };
    I all = _mm512_castsi128_si512(lane(0));
    all = _mm512_inserti32x4(all, lane(1), 1);
    all = _mm512_inserti32x4(all, lane(2), 2);
    return _mm512_inserti32x4(all, lane(3), 3);
  }
  static I low_pairs(I h, I l) {
    const I m = _mm512_set1_epi8(0x33);
    return _mm512_or_si512(_mm512_slli_epi16(_mm512_and_si512(h, m), 2), _mm512_and_si512(l, m));
  }
  static I high_pairs(I h, I l) {
    const I m = _mm512_set1_epi8(static_cast<char>(0xcc));
    return _mm512_or_si512(_mm512_and_si512(h, m), _mm512_srli_epi16(_mm512_and_si512(l, m), 2));
  }
  static I nibble0(I a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
  static I nibble1(I a) { return nibble0(_mm512_srli_epi16(a, 4)); }
  template <int N> static I pair(I a) {
    return _mm512_and_si512(_mm512_srli_epi16(a, 2 * N), _mm512_set1_epi8(3));
  }
  static void transpose4(const I* in, I* out) {
    const I a = _mm512_unpacklo_epi32(in[0], in[1]), b = _mm512_unpackhi_epi32(in[0], in[1]);
    const I c = _mm512_unpacklo_epi32(in[2], in[3]), d = _mm512_unpackhi_epi32(in[2], in[3]);
    out[0] = _mm512_unpacklo_epi64(a, c);
    out[1] = _mm512_unpackhi_epi64(a, c);
    out[2] = _mm512_unpacklo_epi64(b, d);
    out[3] = _mm512_unpackhi_epi64(b, d);
  }
  static I broadcast4(const std::int8_t* p) {
    std::int32_t four;
    std::memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
  }
  static P p_zero() { return _mm512_setzero_si512(); }
  static P step(P acc, I w, I a) { return _mm512_dpbusd_epi32(acc, w, a); }
  // The same where it lies. Of many sums at once GCC would move each to another register and back.
  static void step_into(P& acc, I w, I a) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(a));
  }
  static I32 flush(I32 sum, P p) { return _mm512_add_epi32(sum, p); }
  static I32 i_zero() { return _mm512_setzero_si512(); }
  static constexpr int kOffset8 = 0;
  static I32 step8(I32 acc, I w, I a) { return _mm512_dpbusd_epi32(acc, w, a); }
  static void step8_into(I32& acc, I w, I a) { step_into(acc, w, a); }
  static F to_float(I32 a) { return _mm512_cvtepi32_ps(a); }
  static F f_zero() { return _mm512_setzero_ps(); }
  static F f_load(const float* p) { return _mm512_loadu_ps(p); }
  static void f_store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static F f_set(float x) { return _mm512_set1_ps(x); }
  static F f_half(const std::uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F f_bfloat(const std::uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  using Index = __m512i;
  static Index index(const std::int32_t* p) { return load(p); }
  static F permute(F a, Index at) { return _mm512_permutexvar_ps(at, a); }
  static float sum(F a) { return _mm512_reduce_add_ps(a); }
};

}  // namespace fate
