// How do the codes of a record get into vectors? Once for every vector unit: `S` says what a vector can
// do (simd_*.h).
//
// A vector is W lanes of 128 bits, 4 W floats. The two planes of sixteen bytes make four vectors of
// sixteen codes, by shift and mask alone; whatever a lane holds stays in that lane.
#pragma once

// Ask for what will be read soon; the address may lie past the end of anything.
#if defined(__GNUC__)
#define FATE_PREFETCH(address) __builtin_prefetch(address)
#else
#define FATE_PREFETCH(address)
#endif

namespace fate {
namespace {

// Not from <algorithm>: its templates, compiled here for a wide instruction set, could be the copies
// that the linker keeps for everyone.
inline int least(int a, int b) { return a < b ? a : b; }

template <class S> struct Codes {
  using I = typename S::I;
  using F = typename S::F;
  static constexpr int kLanes = 4 * S::W;   // floats of a vector
  static constexpr int kBytes = 16 * S::W;  // bytes of a vector

  template <int BITS> static void unpack(I high, I low, I* codes) {
    if constexpr (BITS == 2) {
      codes[0] = S::template pair<0>(high);
      codes[1] = S::template pair<1>(high);
      codes[2] = S::template pair<2>(high);
      codes[3] = S::template pair<3>(high);
    } else {
      const I even = S::low_pairs(high, low), odd = S::high_pairs(high, low);
      codes[0] = S::nibble0(even);
      codes[1] = S::nibble0(odd);
      codes[2] = S::nibble1(even);
      codes[3] = S::nibble1(odd);
    }
  }

  // Scales and zeros as the codes of BITS need them: INT2 sits in the middle of the four codes that
  // it stands for; codes of 8 bits may have been moved to make them signed.
  template <int BITS> static F scale_of(F scale) {
    return BITS == 2 ? S::mul(scale, S::f_set(4.0f)) : scale;
  }
  template <int BITS> static F zero_of(F zero) {
    if constexpr (BITS == 2) return S::mul(S::sub(zero, S::f_set(1.5f)), S::f_set(0.25f));
    if constexpr (BITS == 8) return S::sub(zero, S::f_set(static_cast<float>(S::kOffset8)));
    return zero;
  }
};

}  // namespace
}  // namespace fate
