// What is computed for one token of a decoder layer around its experts: attention over the cached
// keys and values, norms, a dense feed-forward, a router?
//
// Float32 throughout. Matrices are records or plain floats; addresses are the caller's to keep alive.
#pragma once

#include <cstddef>
#include <cstdint>

#include "decode.h"
#include "feedforward.h"

namespace fate {

// y = W x + bias for one token; W is a record, or floats [rows, cols] where `record` is null.
struct Projection {
  MatrixPlace place;
  const std::uint8_t* record;
  const float* weight;
  const float* bias;  // may be null
};

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
  Buffer codes[4], q, k, v, between, scores, out;
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

// out = share * down(act(gate(x)) * up(x)), for one token; share is the sigmoid of a dot product with
// x, or 1.
struct DenseBlock {
  Projection gate, up, down;
  Gate form;
  const float* share;  // [D], or null

  void run(Pool& pool, DecodeMemory& memory, const float* x, float* out) const;
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

}  // namespace fate
