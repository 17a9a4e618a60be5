// 256-bit AVX2 with VNNI (AVX-VNNI): Intel's laptops and desktops since 2021 (Alder Lake), AMD since
// Zen 5. One instruction multiplies and adds where AVX2 takes two.
#pragma once

#include "simd_avx2.h"

namespace fate {

struct Avx2Vnni : Avx2 {
  static constexpr const char* name = "avx2-vnni";
  static constexpr bool kWide = true;

  static P step(P acc, I w, I a) { return _mm256_dpbusd_avx_epi32(acc, w, a); }
  static void step_into(P& acc, I w, I a) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(w), "x"(a));
  }
  static I32 flush(I32 sum, P p) { return _mm256_add_epi32(sum, p); }
  static constexpr int kOffset8 = 0;  // codes up to 255 are as this instruction takes them
  static I32 step8(I32 acc, I w, I a) { return step(acc, w, a); }
  static void step8_into(I32& acc, I w, I a) { step_into(acc, w, a); }
};

}  // namespace fate
