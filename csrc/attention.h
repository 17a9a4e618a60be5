// What is computed for one token of a decoder layer around its experts: attention over the cached
// keys and values, norms, a router, a dense feed-forward (that for many tokens, too)?
//
// Float32 throughout. Matrices are records or plain floats; addresses are the caller's to keep alive.
#pragma once

#include <cstddef>
#include <cstdint>

#include "decode.h"
#include "projection.h"

namespace fate {

struct Norm {
  const float* weight;  // null: no norm
  float eps;
};

struct AttentionShape {
  int heads, kv_heads, dim;
  int rotary;       // first elements of a head that are turned, 2 to dim
  float scale;
  Norm q_norm, k_norm;
  bool norm_whole;  // over all heads at once, not head by head
};

// A layer's cache: row t of head h is `dim` floats at keys + h * stride + t * dim. Row `length` is
// free.
struct CachePlace {
  float* keys;
  float* values;
  std::size_t stride;
  int length;
};

// Memory between the parts of a step; grows and is kept.
struct DecodeMemory {
  Products products;
  Buffer q, k, v, between, scores, out, codes;
};

// Norm, turn and append k [kv_heads, dim] and v, then attend with q [heads, dim] into
// out [heads, dim]. Changes q and k.
void attend(Pool& pool, DecodeMemory& memory, const AttentionShape& shape, float* q, float* k,
            const float* v, const float* cos, const float* sin, const CachePlace& cache, float* out);

struct AttentionBlock {
  AttentionShape shape;
  Projection q, k, v, o;
  Norm before, after;
  float residual;  // what the attention's output is multiplied with before it is added

  // out = o(attention(x)); x, out [D].
  void attention(Pool& pool, DecodeMemory& memory, const float* x, const float* cos,
                 const float* sin, const CachePlace& cache, float* out) const;
  // out = x + residual * o(attention(before(x))); normed = after(out). All [D].
  void layer(Pool& pool, DecodeMemory& memory, const float* x, const float* cos, const float* sin,
             const CachePlace& cache, float* out, float* normed) const;
};

// out = share * down(act(gate(x)) * up(x)); share is the sigmoid of a dot product with x, or 1. One
// token in two steps, or many in one.
class DenseBlock {
 public:
  DenseBlock(const Projection& gate, const Projection& up, const Projection& down, const Gate& form,
             const float* share)
      : gate_(gate), up_(up), down_(down), form_(form), share_(share) {}

  // Let other cores begin with x, which must stay until `finish`, while the caller does something else.
  void start(Pool& pool, const float* x);
  void finish(Pool& pool, DecodeMemory& memory, float* out);

  // x, out [tokens, D] at once, where `takes_many`: one set of codes serves gate and up.
  void many(Pool& pool, DecodeMemory& memory, const float* x, int tokens, float* out) const;
  int width() const { return gate_.place.cols; }
  bool takes_many() const {
    return gate_.record && up_.record && down_.record && gate_.place.group == up_.place.group;
  }

 private:
  float share_of(const float* x) const;

  Projection gate_, up_, down_;
  Gate form_;
  const float* share_;  // [D], or null

  // Its own, not all calls': they are in use between `start` and `finish`.
  const float* x_ = nullptr;
  Products inward_;
  Buffer gates_, ups_;
};

// A softmax over all experts' logits, of which the k largest are taken, largest first.
struct RouterBlock {
  const float* weight;  // [experts, width]
  int experts, width, k;
  bool normalized;  // the k weights sum to one

  // logits [experts], weights [k], ids [k].
  void run(DecodeMemory& memory, const float* x, float* logits, float* weights,
           std::int64_t* ids) const;
};

// A linear map in a router's place: W x + bias, x divided by its root mean square first if `eps` is
// not negative.
struct LinearMap {
  const float* weight;  // [experts, width]
  const float* bias;    // [experts]
  int experts, width;
  float eps;

  // The `count` experts with the highest scores, highest first; of equals the lower id.
  std::vector<int> highest(DecodeMemory& memory, const float* x, int count) const;
};

}  // namespace fate
