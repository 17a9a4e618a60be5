// How do many tokens meet a matrix? Once for every vector unit.
//
// kRows rows are unpacked once into a tile that lies as the products need it: for every four columns
// one vector, whose float lane f holds the four codes of row f. Then every token meets it, kTokens at
// a time, and S::kTall tiles at once, so that what is loaded of a token serves twice.
#pragma once

#include <cstring>

#include "codes.inl"
#include "kernels.h"

// Unrolled, the products of several steps are alive at once, and sums go through memory.
#if defined(__clang__)
#define FATE_NO_UNROLL _Pragma("clang loop unroll(disable)")
#elif defined(__GNUC__)
#define FATE_NO_UNROLL _Pragma("GCC unroll 1")
#else
#define FATE_NO_UNROLL
#endif
// Called twice: as a function the sums would go through memory.
#if defined(__GNUC__)
#define FATE_INLINE inline __attribute__((always_inline))
#else
#define FATE_INLINE inline
#endif

namespace fate {
namespace {

template <class S> struct Tiles : Codes<S> {
  using I = typename S::I;
  using I32 = typename S::I32;
  using F = typename S::F;
  using Codes<S>::kBytes;
  using Codes<S>::kLanes;
  static constexpr int kRows = 4 * S::W;  // rows of a tile
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
    const int count = fit > 8 ? 8 : static_cast<int>(fit);
    return count < S::kTall ? S::kTall : count / S::kTall * S::kTall;  // none is left over
  }
  static std::size_t scratch_bytes(int cols, int group) {
    return tile_bytes(cols, group) * tiles_at_once(cols, group);
  }
  static Tile tile_at(std::uint8_t* scratch, int cols, int group, int index) {
    std::uint8_t* base = scratch + tile_bytes(cols, group) * index;
    auto* scale = reinterpret_cast<float*>(base + static_cast<std::size_t>(kRows) * cols);
    return {base, scale, scale + static_cast<std::size_t>(kRows) * (cols / group)};
  }
  static Tile moved(const Tile& tile, std::size_t bytes) {
    const std::size_t floats = bytes / sizeof(float);
    return {tile.codes + bytes, tile.scale + floats, tile.offset + floats};
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
        const F step = Codes<S>::template scale_of<BITS>(S::f_half(scale));
        S::f_store(meta[0][f], step);
        S::f_store(meta[1][f], S::mul(step, Codes<S>::template zero_of<BITS>(S::f_half(zero))));
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
        Codes<S>::template unpack<BITS>(h, BITS == 2 ? I{} : S::gather(low[q]), quarters);
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

  // Add the products of a step, four columns, where the sums lie: of 32 bits, or a P's, the same type.
  template <int BITS, int R, int C>
  static FATE_INLINE void add_step(const Tile* tile, const ActRow* x, std::size_t at,
                                   std::size_t column, I32 (*sum)[C]) {
    I w[R];
    for (int r = 0; r < R; ++r) w[r] = S::load(tile[r].codes + at);
    for (int c = 0; c < C; ++c) {
      const I a = S::broadcast4(x[c].codes + column);
      for (int r = 0; r < R; ++r) {
        if constexpr (BITS == 8) S::step8_into(sum[r][c], w[r], a);
        else S::step_into(sum[r][c], w[r], a);
      }
    }
  }

  // Those of 32 columns, of codes up to 15, where partial sums of 16 bits hold eight steps.
  template <int R, int C>
  static FATE_INLINE void add_half(const Tile* tile, const ActRow* x, std::size_t at,
                                   std::size_t column, I32 (*sum)[C]) {
    typename S::P p[R][C];
    I w[R];
    for (int r = 0; r < R; ++r) w[r] = S::load(tile[r].codes + at);
    for (int c = 0; c < C; ++c) {  // what comes first is added to nothing
      const I a = S::broadcast4(x[c].codes + column);
      for (int r = 0; r < R; ++r) p[r][c] = S::first(w[r], a);
    }
    FATE_NO_UNROLL
    for (int k = 1; k < 8; ++k) add_step<4, R, C>(tile, x, at + k * kBytes, column + 4 * k, p);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) sum[r][c] = S::flush(sum[r][c], p[r][c]);
  }

  template <int BITS, int G, int R, int C>
  static FATE_INLINE void add_group(const Tile* tile, const ActRow* x, std::size_t column,
                                    I32 (*sum)[C]) {
    if constexpr (BITS == 8 || S::kWide) {
      FATE_NO_UNROLL
      for (int k = 0; k < G / 4; ++k)
        add_step<BITS, R, C>(tile, x, k * kBytes, column + 4 * k, sum);
    } else {
      add_half<R, C>(tile, x, 0, column, sum);
      if constexpr (G == 64) add_half<R, C>(tile, x, 8 * kBytes, column + 32, sum);
    }
  }

  // `R` tiles, one after the other in memory, meet `C` tokens.
  template <int BITS, int G, int R, int C>
  static void meet(const Tile& first, std::size_t apart, const ActRow* x, int groups,
                   F (*out)[kTokens]) {
    Tile tile[R];
    F acc[R][C];
    for (int r = 0; r < R; ++r) {
      tile[r] = moved(first, r * apart);
      for (int c = 0; c < C; ++c) acc[r][c] = S::f_zero();
    }
    for (int g = 0; g < groups; ++g) {
      I32 sum[R][C];
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sum[r][c] = S::i_zero();
      const std::size_t column = static_cast<std::size_t>(g) * G;
      add_group<BITS, G, R, C>(tile, x, column, sum);
      for (int r = 0; r < R; ++r) {
        tile[r].codes += G / 4 * kBytes;
        const F scale = S::f_load(tile[r].scale + g * kRows);
        const F offset = S::f_load(tile[r].offset + g * kRows);
        for (int c = 0; c < C; ++c) {
          const float step = x[c].scale[g];
          acc[r][c] = S::fma(S::mul(S::to_float(sum[r][c]), scale), S::f_set(step), acc[r][c]);
          acc[r][c] = S::sub(acc[r][c], S::mul(offset, S::f_set(step * x[c].sum[g])));
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) out[r][c] = acc[r][c];
  }

  template <int BITS, int G, int R>
  static void meet_some(const Tile& tile, std::size_t apart, const ActRow* x, int count, int groups,
                        F (*out)[kTokens]) {
    if (count == 4) return meet<BITS, G, R, 4>(tile, apart, x, groups, out);
    if (count == 3) return meet<BITS, G, R, 3>(tile, apart, x, groups, out);
    if (count == 2) return meet<BITS, G, R, 2>(tile, apart, x, groups, out);
    meet<BITS, G, R, 1>(tile, apart, x, groups, out);
  }

  // One token's results of kRows rows, or of as many as there are.
  static void put(F values, int rows, float* y) {
    if (rows >= kRows) return S::f_store(y, values);
    alignas(64) float part[kRows];
    S::f_store(part, values);
    std::memcpy(y, part, sizeof(float) * rows);
  }

  template <int BITS, int G>
  static void gemm_as(const Matrix& w, const ActRow* x, int tokens, int first, int last, float* y,
                      std::size_t stride, std::uint8_t* scratch) {
    // A step of 8 bits that is several instructions needs the registers itself.
    constexpr int kTall = BITS == 8 && !S::kWide ? 1 : S::kTall;
    const int most = tiles_at_once(w.cols, G) * kRows;
    const std::size_t apart = tile_bytes(w.cols, G);
    for (int from = first; from < last; from += most) {
      const int to = least(from + most, last);
      for (int r = from; r < to; r += kRows)
        fill_tile<BITS, G>(w, r, to, tile_at(scratch, w.cols, G, (r - from) / kRows));
      for (int t = 0; t < tokens; t += kTokens) {
        const int count = least(kTokens, tokens - t);
        for (int r = from; r < to;) {
          F out[kTall][kTokens];
          const Tile tile = tile_at(scratch, w.cols, G, (r - from) / kRows);
          const bool tall = to - r > (kTall - 1) * kRows;
          if (tall) meet_some<BITS, G, kTall>(tile, apart, x + t, count, w.groups(), out);
          else meet_some<BITS, G, 1>(tile, apart, x + t, count, w.groups(), out);
          for (int i = 0; i < (tall ? kTall : 1); ++i, r += kRows)
            for (int c = 0; c < count; ++c) put(out[i][c], to - r, y + (t + c) * stride + r);
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
};

}  // namespace
}  // namespace fate
