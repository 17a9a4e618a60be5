// The kernels, once for every vector unit: `S` says what a vector can do (simd_*.h).
//
// A vector is W lanes of 128 bits, 4 W floats. The two planes of sixteen bytes make four vectors of
// sixteen codes, by shift and mask alone; whatever a lane holds stays in that lane. Sums of products
// are exact integers inside a group; across groups they are added as floats, in an order that depends
// on the instruction set but neither on threads nor on how many tokens are computed together.
#include <cmath>
#include <cstring>

#include "kernels.h"

// Unrolled, the sums of a tile no longer fit the registers and go through memory: 15 % slower.
#if defined(__clang__)
#define FATE_NO_UNROLL _Pragma("clang loop unroll(disable)")
#elif defined(__GNUC__)
#define FATE_NO_UNROLL _Pragma("GCC unroll 1")
#else
#define FATE_NO_UNROLL
#endif
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

template <class S> struct Core {
  using I = typename S::I;
  using I32 = typename S::I32;
  using F = typename S::F;
  static constexpr int kLanes = 4 * S::W;   // floats of a vector = groups of a superblock
  static constexpr int kBytes = 16 * S::W;  // bytes of a vector
  static constexpr int kRows = 4 * S::W;    // rows of a gemm tile
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
    const F step = S::mul(scale_of<BITS>(scale), S::f_load(x.scale + first));
    offsets = S::fma(S::mul(step, zero_of<BITS>(zero)), S::f_load(x.sum + first), offsets);
    const std::int8_t* codes = x.codes + static_cast<std::size_t>(first) * G;
    for (int i = 0; i < blocks; ++i) {
      FATE_PREFETCH(high + i * kBytes + kAhead);
      if constexpr (BITS == 4) FATE_PREFETCH(low + i * kBytes + kAhead);
      I32 sum = S::i_zero();
      if constexpr (BITS == 8) {
        sum = S::step8(sum, S::load(high + i * kBytes), S::load(codes + i * kBytes));
      } else {
        I w[4];
        unpack<BITS>(S::load(high + i * kBytes),
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

  // --- many tokens ---------------------------------------------------------------------------
  //
  // kRows rows are unpacked once into a tile that lies as the products need it: for every four
  // columns one vector, whose float lane f holds the four codes of row f. Then every token meets
  // it, kTokens at a time.

  static constexpr int kTokens = 4;

  struct Tile {
    std::uint8_t* codes;  // [cols / 4][kRows][4]
    float* scale;         // [groups][kRows]
    float* offset;        // scale * zero, the same
  };

  static std::size_t tile_bytes(int cols, int group) {
    return static_cast<std::size_t>(kRows) * (cols + 8 * (cols / group));
  }
  static int tiles_at_once(int cols, int group) {
    constexpr std::size_t kCache = 160 << 10;  // a share of the second-level cache
    const std::size_t fit = kCache / tile_bytes(cols, group);
    return fit < 1 ? 1 : fit > 8 ? 8 : static_cast<int>(fit);
  }
  static std::size_t gemm_scratch_bytes(int cols, int group) {
    return tile_bytes(cols, group) * tiles_at_once(cols, group);
  }
  static Tile tile_at(std::uint8_t* scratch, int cols, int group, int index) {
    std::uint8_t* base = scratch + tile_bytes(cols, group) * index;
    auto* scale = reinterpret_cast<float*>(base + static_cast<std::size_t>(kRows) * cols);
    return {base, scale, scale + static_cast<std::size_t>(kRows) * (cols / group)};
  }

  template <int BITS> static void fill_meta(const Matrix& w, const int* rows, const Tile& tile) {
    const int groups = w.groups();
    alignas(64) float meta[2][kRows][kLanes];  // scales and offsets of kLanes groups
    for (int g = 0; g < groups; g += kLanes) {
      const int count = least(kLanes, groups - g);
      for (int f = 0; f < kRows; ++f) {
        const std::size_t at = static_cast<std::size_t>(rows[f]) * groups + g;
        alignas(64) std::uint16_t rest[2][kLanes] = {};
        const std::uint16_t *scale = w.scale + at, *zero = w.zero + at;
        if (count < kLanes) {  // not to read past the record's end
          scale = static_cast<std::uint16_t*>(std::memcpy(rest[0], scale, 2 * count));
          zero = static_cast<std::uint16_t*>(std::memcpy(rest[1], zero, 2 * count));
        }
        const F step = scale_of<BITS>(S::f_half(scale));
        S::f_store(meta[0][f], step);
        S::f_store(meta[1][f], S::mul(step, zero_of<BITS>(S::f_half(zero))));
      }
      for (int i = 0; i < count; i += 4) {
        for (int which = 0; which < 2; ++which) {
          I quarter[4], turned[4];
          for (int q = 0; q < 4; ++q) {
            const std::uint8_t* lanes[S::W];
            for (int l = 0; l < S::W; ++l)
              lanes[l] = reinterpret_cast<const std::uint8_t*>(&meta[which][4 * l + q][i]);
            quarter[q] = S::gather(lanes);
          }
          S::transpose4(quarter, turned);
          float* out = (which == 0 ? tile.scale : tile.offset) + (g + i) * kRows;
          for (int d = 0; d < least(4, count - i); ++d) S::store(out + d * kRows, turned[d]);
        }
      }
    }
  }

  // One block of sixteen bytes of every row, to four vectors a quarter.
  template <int BITS, int G>
  static void put_block(const std::uint8_t* const (*high)[S::W], const std::uint8_t* const (*low)[S::W],
                        int block, bool half, std::uint8_t* out) {
    I codes[4][4];  // [quarter of the group][row in its lane]
    for (int q = 0; q < 4; ++q) {
      I h = S::gather(high[q]);
      if constexpr (BITS == 8) {
        codes[0][q] = h;
      } else {
        I quarters[4];
        unpack<BITS>(h, BITS == 2 ? I{} : S::gather(low[q]), quarters);
        for (int j = 0; j < 4; ++j) codes[j][q] = quarters[j];
      }
    }
    for (int j = 0; j < (BITS == 8 ? 1 : 4); ++j) {
      I turned[4];
      S::transpose4(codes[j], turned);
      for (int d = 0; d < (half ? 2 : 4); ++d) {
        int four = 0;  // which four columns
        if (BITS == 8) four = 4 * block + d;
        else if (G == 64) four = 16 * block + 4 * j + d;
        else four = 8 * (2 * block + d / 2) + 2 * j + d % 2;
        S::store(out + static_cast<std::size_t>(four) * kBytes, turned[d]);
      }
    }
  }

  template <int BITS, int G>
  static void fill_tile(const Matrix& w, int first, int last, const Tile& tile) {
    int rows[kRows];
    for (int f = 0; f < kRows; ++f) rows[f] = least(first + f, last - 1);
    fill_meta<BITS>(w, rows, tile);
    const std::size_t row_bytes = BITS == 8 ? w.cols : w.cols / 4;
    const int blocks = static_cast<int>(row_bytes / 16);
    const std::uint8_t *high[4][S::W], *low[4][S::W];
    for (int block = 0; block < blocks; ++block) {
      for (int q = 0; q < 4; ++q)
        for (int l = 0; l < S::W; ++l) {
          high[q][l] = w.high + rows[4 * l + q] * row_bytes + 16 * block;
          if (BITS == 4) low[q][l] = w.low + rows[4 * l + q] * row_bytes + 16 * block;
        }
      put_block<BITS, G>(high, low, block, false, tile.codes);
    }
    if (row_bytes % 16) {  // an odd number of groups of 32: half a block is left
      alignas(16) std::uint8_t rest[2][kRows][16] = {};
      for (int f = 0; f < kRows; ++f) {
        std::memcpy(rest[0][f], w.high + rows[f] * row_bytes + 16 * blocks, 8);
        if (BITS == 4) std::memcpy(rest[1][f], w.low + rows[f] * row_bytes + 16 * blocks, 8);
        high[f % 4][f / 4] = rest[0][f];
        low[f % 4][f / 4] = rest[1][f];
      }
      put_block<BITS, G>(high, low, blocks, true, tile.codes);
    }
  }

  template <int BITS, int G, int C>
  static void meet(const Tile& tile, const ActRow* x, int groups, F* out) {
    F acc[C];
    for (int c = 0; c < C; ++c) acc[c] = S::f_zero();
    const std::uint8_t* codes = tile.codes;
    for (int g = 0; g < groups; ++g) {
      I32 sum[C];
      for (int c = 0; c < C; ++c) sum[c] = S::i_zero();
      const std::size_t column = static_cast<std::size_t>(g) * G;
      for (int half = 0; half < G / 32; ++half) {  // eight steps fit the narrowest partial sum
        typename S::P p[C];
        for (int c = 0; c < C; ++c) p[c] = S::p_zero();
        FATE_NO_UNROLL
        for (int k = 0; k < 8; ++k) {
          const I w = S::load(codes + (8 * half + k) * kBytes);
          for (int c = 0; c < C; ++c) {
            const I a = S::broadcast4(x[c].codes + column + 32 * half + 4 * k);
            if constexpr (BITS == 8) sum[c] = S::step8(sum[c], w, a);
            else p[c] = S::step(p[c], w, a);
          }
        }
        if constexpr (BITS != 8)
          for (int c = 0; c < C; ++c) sum[c] = S::flush(sum[c], p[c]);
      }
      codes += G / 4 * kBytes;
      const F scale = S::f_load(tile.scale + g * kRows), offset = S::f_load(tile.offset + g * kRows);
      for (int c = 0; c < C; ++c) {
        const float step = x[c].scale[g];
        acc[c] = S::fma(S::mul(S::to_float(sum[c]), scale), S::f_set(step), acc[c]);
        acc[c] = S::sub(acc[c], S::mul(offset, S::f_set(step * x[c].sum[g])));
      }
    }
    for (int c = 0; c < C; ++c) out[c] = acc[c];
  }

  template <int BITS, int G>
  static void meet_some(const Tile& tile, const ActRow* x, int count, int groups, F* out) {
    if (count == 4) return meet<BITS, G, 4>(tile, x, groups, out);
    if (count == 3) return meet<BITS, G, 3>(tile, x, groups, out);
    if (count == 2) return meet<BITS, G, 2>(tile, x, groups, out);
    meet<BITS, G, 1>(tile, x, groups, out);
  }

  template <int BITS, int G>
  static void gemm_as(const Matrix& w, const ActRow* x, int tokens, int first, int last, float* y,
                      std::size_t stride, std::uint8_t* scratch) {
    const int most = tiles_at_once(w.cols, G) * kRows;
    for (int from = first; from < last; from += most) {
      const int to = least(from + most, last);
      for (int r = from; r < to; r += kRows)
        fill_tile<BITS, G>(w, r, to, tile_at(scratch, w.cols, G, (r - from) / kRows));
      for (int t = 0; t < tokens; t += kTokens) {
        const int count = least(kTokens, tokens - t);
        for (int r = from; r < to; r += kRows) {
          F out[kTokens];
          meet_some<BITS, G>(tile_at(scratch, w.cols, G, (r - from) / kRows), x + t, count,
                             w.groups(), out);
          for (int c = 0; c < count; ++c) {
            float* place = y + (t + c) * stride + r;
            if (to - r >= kRows) {
              S::f_store(place, out[c]);
            } else {
              alignas(64) float part[kRows];
              S::f_store(part, out[c]);
              std::memcpy(place, part, sizeof(float) * (to - r));
            }
          }
        }
      }
    }
  }

  static void gemm(const Matrix& w, const ActRow* x, int tokens, int first, int last, float* y,
                   std::size_t stride, std::uint8_t* scratch) {
    const bool wide = w.group == 64;
    if (w.bits == 4) return wide ? gemm_as<4, 64>(w, x, tokens, first, last, y, stride, scratch)
                                 : gemm_as<4, 32>(w, x, tokens, first, last, y, stride, scratch);
    if (w.bits == 2) return wide ? gemm_as<2, 64>(w, x, tokens, first, last, y, stride, scratch)
                                 : gemm_as<2, 32>(w, x, tokens, first, last, y, stride, scratch);
    return wide ? gemm_as<8, 64>(w, x, tokens, first, last, y, stride, scratch)
                : gemm_as<8, 32>(w, x, tokens, first, last, y, stride, scratch);
  }

  // --- activations ---------------------------------------------------------------------------
  //
  // Written so that the compiler makes vectors of the loops: no branches, no library calls.

  static float exp_of(float x) {  // relative error below 3e-7 on [-87, 88]
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const std::int32_t power = (static_cast<std::int32_t>(n) + 127) << 23;
    float scale = 0;
    std::memcpy(&scale, &power, sizeof scale);
    return p * scale;
  }
  static float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }

  template <Act ACT> static float act_of(float x, float alpha) {
    if constexpr (ACT == Act::kGelu) return 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
    if constexpr (ACT == Act::kGeluTanh)  // (1 + tanh(u)) / 2 = sigmoid(2 u)
      return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
    if constexpr (ACT == Act::kRelu) return x > 0 ? x : 0;
    if constexpr (ACT == Act::kRelu2) return x > 0 ? x * x : 0;
    return x * sigmoid(alpha * x);
  }

  template <Act ACT>
  static void activate_as(const Gate& form, const float* gate, const float* up, int stride,
                          int count, float* out) {
    const float alpha = form.alpha, limit = form.limit, offset = form.offset;
    const float before = form.limit_after ? INFINITY : limit;
    const float after = form.limit_after ? limit : INFINITY;
    if (up == nullptr) {
      for (int i = 0; i < count; ++i) out[i] = act_of<ACT>(gate[i * stride], alpha);
    } else if (stride == 1 && std::isinf(limit)) {
      for (int i = 0; i < count; ++i) out[i] = act_of<ACT>(gate[i], alpha) * (up[i] + offset);
    } else {
      for (int i = 0; i < count; ++i) {
        const float g = gate[i * stride] > before ? before : gate[i * stride];
        const float u = up[i * stride] > limit ? limit : up[i * stride];
        const float a = act_of<ACT>(g, alpha);
        out[i] = (a > after ? after : a) * ((u < -limit ? -limit : u) + offset);
      }
    }
  }

  static void activate(const Gate& form, const float* gate, const float* up, int stride, int count,
                       float* out) {
    switch (form.act) {
      case Act::kSilu: return activate_as<Act::kSilu>(form, gate, up, stride, count, out);
      case Act::kGelu: return activate_as<Act::kGelu>(form, gate, up, stride, count, out);
      case Act::kGeluTanh: return activate_as<Act::kGeluTanh>(form, gate, up, stride, count, out);
      case Act::kRelu: return activate_as<Act::kRelu>(form, gate, up, stride, count, out);
      case Act::kRelu2: return activate_as<Act::kRelu2>(form, gate, up, stride, count, out);
    }
  }

  static constexpr Kernels table() {
    return {S::name, kRows, quantize, gemv, gemm, gemm_scratch_bytes, activate};
  }
};

}  // namespace
}  // namespace fate
