// 256-bit AVX2 with FMA and F16C: x86-64 since 2013.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace fate {

struct Avx2 {
  static constexpr int W = 2;
  static constexpr int kTall = 2;  // tiles that a token meets at once
  static constexpr bool kWide = false;  // sums of steps have 32 bits; otherwise 16, begun by `first`
  static constexpr const char* name = "avx2";
  using I = __m256i;
  using I32 = __m256i;
  using F = __m256;
  using P = __m256i;  // 16-bit sums: eight steps of codes <= 15 fit (8 * 2 * 15 * 127 = 30480)

  static I load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store(void* p, I a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
  static I gather(const std::uint8_t* const* lanes) {
    const auto lane = [&](int i) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(lanes[i]));
    };
    return _mm256_inserti128_si256(_mm256_castsi128_si256(lane(0)), lane(1), 1);
  }
  static I low_pairs(I h, I l) {
    const I m = _mm256_set1_epi8(0x33);
    return _mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(h, m), 2), _mm256_and_si256(l, m));
  }
  static I high_pairs(I h, I l) {
    const I m = _mm256_set1_epi8(static_cast<char>(0xcc));
    return _mm256_or_si256(_mm256_and_si256(h, m), _mm256_srli_epi16(_mm256_and_si256(l, m), 2));
  }
  static I nibble0(I a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
  static I nibble1(I a) { return nibble0(_mm256_srli_epi16(a, 4)); }
  template <int N> static I pair(I a) {
    return _mm256_and_si256(_mm256_srli_epi16(a, 2 * N), _mm256_set1_epi8(3));
  }
  static void transpose4(const I* in, I* out) {
    const I a = _mm256_unpacklo_epi32(in[0], in[1]), b = _mm256_unpackhi_epi32(in[0], in[1]);
    const I c = _mm256_unpacklo_epi32(in[2], in[3]), d = _mm256_unpackhi_epi32(in[2], in[3]);
    out[0] = _mm256_unpacklo_epi64(a, c);
    out[1] = _mm256_unpackhi_epi64(a, c);
    out[2] = _mm256_unpacklo_epi64(b, d);
    out[3] = _mm256_unpackhi_epi64(b, d);
  }
  static I broadcast4(const std::int8_t* p) {
    std::int32_t four;
    std::memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
  }
  static P p_zero() { return _mm256_setzero_si256(); }
  static P first(I w, I a) { return _mm256_maddubs_epi16(w, a); }
  static P step(P acc, I w, I a) { return _mm256_add_epi16(acc, first(w, a)); }
  // The same where it lies. Of many sums at once GCC would move each to another register and back.
  static void step_into(P& acc, I w, I a) {
    const I pairs = first(w, a);
    __asm__("vpaddw %1, %0, %0" : "+x"(acc) : "x"(pairs));
  }
  static I32 flush(I32 sum, P p) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(p, _mm256_set1_epi16(1)));
  }
  static I32 i_zero() { return _mm256_setzero_si256(); }
  // Codes up to 255, less kOffset8 to make them signed: |w| times the activation with w's sign, whose
  // pair sums fit 16 bits (2 * 128 * 127).
  static constexpr int kOffset8 = 128;
  static I32 step8(I32 acc, I w, I a) { return _mm256_add_epi32(acc, quads8(w, a)); }
  static void step8_into(I32& acc, I w, I a) {
    const I32 quads = quads8(w, a);
    __asm__("vpaddd %1, %0, %0" : "+x"(acc) : "x"(quads));
  }
  static I32 quads8(I w, I a) {
    const I centred = _mm256_xor_si256(w, _mm256_set1_epi8(static_cast<char>(0x80)));
    const I pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(centred), _mm256_sign_epi8(a, centred));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
  static F to_float(I32 a) { return _mm256_cvtepi32_ps(a); }
  static F f_zero() { return _mm256_setzero_ps(); }
  static F f_load(const float* p) { return _mm256_loadu_ps(p); }
  static void f_store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static F f_set(float x) { return _mm256_set1_ps(x); }
  static F f_half(const std::uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static F f_bfloat(const std::uint16_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  using Index = __m256i;
  static Index index(const std::int32_t* p) { return load(p); }
  static F permute(F a, Index at) { return _mm256_permutevar8x32_ps(a, at); }
  static float sum(F a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
};

}  // namespace fate
