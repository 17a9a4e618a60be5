// The kernels, once for every vector unit: `S` says what a vector can do (simd_*.h).
//
// Sums of products are exact integers inside a group; across groups they are added as floats, in an
// order that depends on the instruction set but neither on threads nor on how many tokens are computed
// together.
#include <cmath>
#include <cstring>

#include "codes.inl"
#include "gate.inl"
#include "kernels.h"
#include "tiles.inl"

namespace fate {
namespace {

template <class S> struct Core : Codes<S> {
  using I = typename S::I;
  using I32 = typename S::I32;
  using F = typename S::F;
  using Codes<S>::kBytes;
  using Codes<S>::kLanes;  // groups of a superblock
  // Bytes that `gemv` asks for ahead in each plane: the processor's own guess sees four short streams.
  static constexpr int kAhead = 2048;

  // --- activations ---------------------------------------------------------------------------

  // Where weight w of group g lies in lanes order: the order in which `unpack` yields the codes.
  static int lane_place(int g, int w, int group) {
    const int per_lane = 64 / group;  // groups whose plane bytes share a 128-bit lane
    const int lane = g / per_lane, quarter = group / 4;
    const int j = w / quarter, byte = w % quarter + quarter * (g % per_lane);
    return (lane / S::W) * 4 * kBytes + j * kBytes + (lane % S::W) * 16 + byte;
  }

  static void quantize(const float* x, int cols, int group, bool lanes, std::uint8_t* out) {
    const int groups = cols / group;
    const std::size_t padded = padded_groups(groups);
    auto* codes = reinterpret_cast<std::int8_t*>(out);
    auto* scale = reinterpret_cast<float*>(out + padded * group);
    float* sum = scale + padded;
    const int begin = lanes ? 0 : groups * group;
    std::memset(codes + begin, 0, padded * group - begin);
    for (int g = 0; g < groups; ++g) {
      const float* part = x + static_cast<std::size_t>(g) * group;
      float most_of[16] = {};  // side by side: a compiler makes vectors of them
      for (int i = 0; i < group; i += 16)
        for (int j = 0; j < 16; ++j) {
          const float size = std::fabs(part[i + j]);
          most_of[j] = most_of[j] > size ? most_of[j] : size;
        }
      float most = 0;
      for (int j = 0; j < 16; ++j) most = most > most_of[j] ? most : most_of[j];
      const float step = most / 127.0f, inverse = most > 0 ? 127.0f / most : 0.0f;
      // Adding 1.5 * 2^23 rounds to the nearest even integer, which is then the low bits of the sum.
      float shifted[64];
      std::uint32_t bits[64];
      std::int8_t rounded[64];
      for (int i = 0; i < group; ++i) shifted[i] = part[i] * inverse + 12582912.0f;
      std::memcpy(bits, shifted, 4 * group);
      std::uint32_t total = 0;
      for (int i = 0; i < group; ++i) {
        rounded[i] = static_cast<std::int8_t>(bits[i]);
        total += bits[i] - 0x4b400000u;
      }
      scale[g] = step;
      sum[g] = static_cast<float>(static_cast<std::int32_t>(total));
      if (!lanes) {
        std::memcpy(codes + static_cast<std::size_t>(g) * group, rounded, group);
      } else {
        const int quarter = group / 4;
        for (int j = 0; j < 4; ++j)
          std::memcpy(codes + lane_place(g, j * quarter, group), rounded + j * quarter, quarter);
      }
    }
    for (std::size_t g = groups; g < padded; ++g) scale[g] = sum[g] = 0;
  }

  // --- one token -----------------------------------------------------------------------------

  // Vectors of codes in a superblock of kLanes groups, times the codes they hold at once.
  template <int BITS, int G> static constexpr int kBlocks = BITS == 8 ? G / 4 : G / 16;

  // Which group of its superblock each float lane of each block belongs to.
  template <int BITS, int G> struct Lanes {
    std::int32_t group[kBlocks<BITS, G>][kLanes];
    constexpr Lanes() : group() {
      for (int i = 0; i < kBlocks<BITS, G>; ++i)
        for (int f = 0; f < kLanes; ++f)
          group[i][f] = BITS == 8   ? (kBytes * i + 4 * f) / G
                        : G == 64 ? i * S::W + f / 4
                                  : i * 2 * S::W + 2 * (f / 4) + f % 4 / 2;
    }
  };

  template <int BITS, int G>
  static void superblock(const std::uint8_t* high, const std::uint8_t* low, F scale, F zero,
                         const ActRow& x, int first, int blocks, const typename S::Index* lanes,
                         F& products, F& offsets) {
    const F step = S::mul(Codes<S>::template scale_of<BITS>(scale), S::f_load(x.scale + first));
    const F shift = S::mul(step, Codes<S>::template zero_of<BITS>(zero));
    offsets = S::fma(shift, S::f_load(x.sum + first), offsets);
    const std::int8_t* codes = x.codes + static_cast<std::size_t>(first) * G;
    for (int i = 0; i < blocks; ++i) {
      FATE_PREFETCH(high + i * kBytes + kAhead);
      if constexpr (BITS == 4) FATE_PREFETCH(low + i * kBytes + kAhead);
      I32 sum = S::i_zero();
      if constexpr (BITS == 8) {
        sum = S::step8(sum, S::load(high + i * kBytes), S::load(codes + i * kBytes));
      } else {
        I w[4];
        Codes<S>::template unpack<BITS>(S::load(high + i * kBytes),
                                        BITS == 2 ? I{} : S::load(low + i * kBytes), w);
        typename S::P p = S::p_zero();
        for (int j = 0; j < 4; ++j) p = S::step(p, w[j], S::load(codes + (4 * i + j) * kBytes));
        sum = S::flush(sum, p);
      }
      products = S::fma(S::to_float(sum), S::permute(step, lanes[i]), products);
    }
  }

  template <int BITS, int G>
  static void gemv_as(const Matrix& w, const ActRow& x, int first, int last, float* y) {
    constexpr int blocks = kBlocks<BITS, G>;
    constexpr int group_bytes = BITS == 8 ? G : G / 4;
    static constexpr Lanes<BITS, G> table{};
    typename S::Index lanes[blocks];
    for (int i = 0; i < blocks; ++i) lanes[i] = S::index(table.group[i]);
    const int groups = w.groups(), whole = groups / kLanes * kLanes, rest = groups - whole;
    const int rest_blocks = (rest * group_bytes + kBytes - 1) / kBytes;
    const std::size_t all = static_cast<std::size_t>(w.rows) * groups;
    for (int r = first; r < last; ++r) {
      const std::size_t at = static_cast<std::size_t>(r) * groups;
      const std::uint16_t *scale = w.scale + at, *zero = w.zero + at;
      const std::uint8_t* high = w.high + at * group_bytes;
      const std::uint8_t* low = BITS == 4 ? w.low + at * group_bytes : nullptr;
      F products = S::f_zero(), offsets = S::f_zero();
      for (int g = 0; g < whole; g += kLanes)
        superblock<BITS, G>(high + g * group_bytes, BITS == 4 ? low + g * group_bytes : nullptr,
                            S::f_half(scale + g), S::f_half(zero + g), x, g, blocks, lanes,
                            products, offsets);
      if (rest > 0 && at + whole + kLanes <= all) {  // the next row's, finite, meet activations of zero
        superblock<BITS, G>(high + whole * group_bytes,
                            BITS == 4 ? low + whole * group_bytes : nullptr,
                            S::f_half(scale + whole), S::f_half(zero + whole), x, whole,
                            rest_blocks, lanes, products, offsets);
      } else if (rest > 0) {  // not to read past the record's end
        alignas(64) std::uint16_t meta[2][kLanes] = {};
        alignas(64) std::uint8_t planes[2][blocks * kBytes] = {};
        std::memcpy(meta[0], scale + whole, 2 * rest);
        std::memcpy(meta[1], zero + whole, 2 * rest);
        std::memcpy(planes[0], high + whole * group_bytes, rest * group_bytes);
        if (BITS == 4) std::memcpy(planes[1], low + whole * group_bytes, rest * group_bytes);
        superblock<BITS, G>(planes[0], planes[1], S::f_half(meta[0]), S::f_half(meta[1]), x, whole,
                            rest_blocks, lanes, products, offsets);
      }
      y[r - first] = S::sum(S::sub(products, offsets));
    }
  }

  static void gemv(const Matrix& w, const ActRow& x, int first, int last, float* y) {
    if (w.bits == 4) return w.group == 64 ? gemv_as<4, 64>(w, x, first, last, y)
                                          : gemv_as<4, 32>(w, x, first, last, y);
    if (w.bits == 2) return w.group == 64 ? gemv_as<2, 64>(w, x, first, last, y)
                                          : gemv_as<2, 32>(w, x, first, last, y);
    return w.group == 64 ? gemv_as<8, 64>(w, x, first, last, y)
                         : gemv_as<8, 32>(w, x, first, last, y);
  }

  static constexpr Kernels table() {
    return {S::name,        Tiles<S>::kRows * S::kTall, quantize, gemv, Tiles<S>::gemm,
            Tiles<S>::scratch_bytes, activate};
  }
};

}  // namespace
}  // namespace fate
