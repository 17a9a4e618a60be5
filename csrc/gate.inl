// What stands between an expert's two matrices, compiled once for every instruction set.
//
// Written so that the compiler makes vectors of the loops: no branches, no library calls.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace fate {
namespace {

// `inline`, for not all who include this need all of it.
inline float exp_of(float x) {  // relative error below 3e-7 on [-87, 88]
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
inline float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }

template <Act ACT> inline float act_of(float x, float alpha) {
  if constexpr (ACT == Act::kGelu) return 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
  if constexpr (ACT == Act::kGeluTanh)  // (1 + tanh(u)) / 2 = sigmoid(2 u)
    return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
  if constexpr (ACT == Act::kRelu) return x > 0 ? x : 0;
  if constexpr (ACT == Act::kRelu2) return x > 0 ? x * x : 0;
  return x * sigmoid(alpha * x);
}

template <Act ACT>
inline void activate_as(const Gate& form, const float* gate, const float* up, int stride,
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

inline void activate(const Gate& form, const float* gate, const float* up, int stride, int count,
                     float* out) {
  switch (form.act) {
    case Act::kSilu: return activate_as<Act::kSilu>(form, gate, up, stride, count, out);
    case Act::kGelu: return activate_as<Act::kGelu>(form, gate, up, stride, count, out);
    case Act::kGeluTanh: return activate_as<Act::kGeluTanh>(form, gate, up, stride, count, out);
    case Act::kRelu: return activate_as<Act::kRelu>(form, gate, up, stride, count, out);
    case Act::kRelu2: return activate_as<Act::kRelu2>(form, gate, up, stride, count, out);
  }
}

}  // namespace
}  // namespace fate
