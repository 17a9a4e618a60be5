#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>

namespace fate {

extern const DecodeKernels kDecodePortable;
#if defined(FATE_X86)
extern const DecodeKernels kDecodeAvx2, kDecodeAvx512;
#elif defined(FATE_NEON)
extern const DecodeKernels kDecodeNeon;
#endif

const DecodeKernels& decode_kernels() {
  const char* name = active().name;
#if defined(FATE_X86)
  // avx2-vnni has the floats of avx2, and none of its own.
  for (const DecodeKernels* one : {&kDecodeAvx512, &kDecodeAvx2})
    if (std::strncmp(one->name, name, std::strlen(one->name)) == 0) return *one;
#elif defined(FATE_NEON)
  if (std::strcmp(kDecodeNeon.name, name) == 0) return kDecodeNeon;
#endif
  static_cast<void>(name);
  return kDecodePortable;
}

namespace {

// Run pieces on all cores where the work is worth waking them.
template <class Work> void share(Pool& pool, std::size_t size, int pieces, const Work& work) {
  if (size >= Products::kWorthSharing) return pool.run(pieces, work);
  for (int piece = 0; piece < pieces; ++piece) work(piece, 0);
}

// Products with the same x, one after the other done with.
void project(Pool& pool, DecodeMemory& memory, const float* x,
             std::initializer_list<Product> products) {
  memory.products.prepare(x, products);
  memory.products.run(pool);
}

void norm_heads(const Norm& norm, float* x, int heads, int dim, bool whole) {
  if (norm.weight == nullptr) return;
  if (whole) return decode_kernels().rms_norm(x, norm.weight, heads * dim, norm.eps, x);
  for (int h = 0; h < heads; ++h)
    decode_kernels().rms_norm(x + h * dim, norm.weight, dim, norm.eps, x + h * dim);
}

// One token's attention: scores, their softmax, the mean of the values; `kv` is a head of keys, with
// the queries that share it.
struct Attended {
  static constexpr int kSpan = 256;    // tokens that one core scores at a time
  static constexpr int kColumns = 32;  // of values that one core adds up at a time
  static_assert(kSpan % kKeysAtOnce == 0, "bits would depend on the spans");

  const DecodeKernels& kernels;
  const AttentionShape& shape;
  const float* q;
  const CachePlace& cache;
  float* scores;  // [heads, tokens]
  float* out;

  int tokens() const { return cache.length + 1; }
  int queries() const { return shape.heads / shape.kv_heads; }
  float* scores_of(int kv) const {
    return scores + static_cast<std::size_t>(kv) * queries() * tokens();
  }

  void append(int kv, const float* k, const float* v) const {
    const std::size_t at = kv * cache.stride + static_cast<std::size_t>(cache.length) * shape.dim;
    std::memcpy(cache.keys + at, k, sizeof(float) * shape.dim);
    std::memcpy(cache.values + at, v, sizeof(float) * shape.dim);
  }
  void score(int kv, int first, int last) const {
    kernels.score(q + kv * queries() * shape.dim, cache.keys + kv * cache.stride, shape.dim,
                  queries(), first, last, shape.scale, scores_of(kv), tokens());
  }
  void weigh(int query) const {
    kernels.softmax(scores + static_cast<std::size_t>(query) * tokens(), tokens());
  }
  void mix(int kv, int first, int last) const {
    kernels.mix(scores_of(kv), cache.values + kv * cache.stride, tokens(), shape.dim, queries(),
                first, last, out + kv * queries() * shape.dim);
  }

  // Heads of keys side by side; parts of them where that would leave cores idle. Same bits either way.
  void run(Pool& pool) const {
    const std::size_t size = static_cast<std::size_t>(tokens()) * shape.kv_heads * shape.dim;
    const int cores = pool.threads();
    const bool even = shape.kv_heads % cores == 0 || shape.kv_heads >= 4 * cores;
    if (!even && tokens() >= 2 * kSpan && size >= Products::kWorthSharing) return run_split(pool);
    share(pool, size, shape.kv_heads, [this](int kv, int) {
      score(kv, 0, tokens());
      for (int g = 0; g < queries(); ++g) weigh(kv * queries() + g);
      mix(kv, 0, shape.dim);
    });
  }
  void run_split(Pool& pool) const {
    const int spans = (tokens() + kSpan - 1) / kSpan;
    pool.run(shape.kv_heads * spans, [this, spans](int piece, int) {
      const int first = piece % spans * kSpan;
      score(piece / spans, first, std::min(first + kSpan, tokens()));
    });
    pool.run(shape.heads, [this](int query, int) { weigh(query); });
    const int parts = (shape.dim + kColumns - 1) / kColumns;
    pool.run(shape.kv_heads * parts, [this, parts](int piece, int) {
      const int first = piece % parts * kColumns;
      mix(piece / parts, first, std::min(first + kColumns, shape.dim));
    });
  }
};

}  // namespace

void attend(Pool& pool, DecodeMemory& memory, const AttentionShape& shape, float* q, float* k,
            const float* v, const float* cos, const float* sin, const CachePlace& cache, float* out) {
  const DecodeKernels& kernels = decode_kernels();
  const int dim = shape.dim, length = cache.length + 1;
  norm_heads(shape.q_norm, q, shape.heads, dim, shape.norm_whole);
  norm_heads(shape.k_norm, k, shape.kv_heads, dim, shape.norm_whole);
  for (int h = 0; h < shape.heads; ++h) kernels.rotate(q + h * dim, cos, sin, shape.rotary / 2);
  const Attended step{kernels, shape, q, cache, memory.scores.floats(1ul * shape.heads * length), out};
  for (int kv = 0; kv < shape.kv_heads; ++kv) {
    kernels.rotate(k + kv * dim, cos, sin, shape.rotary / 2);
    step.append(kv, k + kv * dim, v + kv * dim);
  }
  step.run(pool);
}

void AttentionBlock::attention(Pool& pool, DecodeMemory& memory, const float* x, const float* cos,
                               const float* sin, const CachePlace& cache, float* out) const {
  float* const queries = memory.q.floats(q.place.rows);
  float* const keys = memory.k.floats(k.place.rows);
  float* const values = memory.v.floats(v.place.rows);
  float* const attended = memory.between.floats(q.place.rows);
  project(pool, memory, x, {{&q, queries}, {&k, keys}, {&v, values}});
  attend(pool, memory, shape, queries, keys, values, cos, sin, cache, attended);
  project(pool, memory, attended, {{&o, out}});
}

void AttentionBlock::layer(Pool& pool, DecodeMemory& memory, const float* x, const float* cos,
                           const float* sin, const CachePlace& cache, float* out,
                           float* normed) const {
  const int width = q.place.cols;
  decode_kernels().rms_norm(x, before.weight, width, before.eps, normed);
  attention(pool, memory, normed, cos, sin, cache, out);
  for (int i = 0; i < width; ++i) out[i] = x[i] + residual * out[i];
  decode_kernels().rms_norm(out, after.weight, width, after.eps, normed);
}

void DenseBlock::start(Pool& pool, const float* x) {
  pool.join();  // what an earlier start left unfinished still computes with our memory
  const int width = gate_.place.rows;
  x_ = x;
  inward_.prepare(x, {{&gate_, gates_.floats(width)}, {&up_, ups_.floats(width)}});
  if (inward_.is_worth_sharing()) return pool.post_spans(inward_.pieces(), inward_);
  inward_(0, inward_.pieces(), 0);
}

void DenseBlock::finish(Pool& pool, DecodeMemory& memory, float* out) {
  pool.join();
  const int width = gate_.place.rows;
  float* const inner = memory.between.floats(width);
  active().activate(form_, gates_.floats(width), ups_.floats(width), 1, width, inner);
  project(pool, memory, inner, {{&down_, out}});
  const float factor = share_of(x_);
  for (int d = 0; d < down_.place.rows; ++d) out[d] *= factor;
}

float DenseBlock::share_of(const float* x) const {
  if (share_ == nullptr) return 1.0f;
  float score = 0;
  decode_kernels().gemv(share_, x, gate_.place.cols, 0, 1, &score);
  return 1.0f / (1.0f + std::exp(-score));
}

void DenseBlock::many(Pool& pool, DecodeMemory& memory, const float* x, int tokens,
                      float* out) const {
  const std::size_t width = gate_.place.cols, inner = gate_.place.rows;
  float* const gates = memory.q.floats(inner * tokens);
  float* const ups = memory.k.floats(inner * tokens);
  const std::vector<ActRow> in =
      quantize_all(pool, memory.codes, x, tokens, gate_.place.cols, gate_.place.group);
  multiply(pool, gate_.place.at(gate_.record), gate_.bias, in, gates);
  multiply(pool, up_.place.at(up_.record), up_.bias, in, ups);
  pool.run(tokens, [&](int t, int) {
    float* const row = gates + t * inner;
    active().activate(form_, row, ups + t * inner, 1, static_cast<int>(inner), row);
  });
  const std::vector<ActRow> between =
      quantize_all(pool, memory.codes, gates, tokens, down_.place.cols, down_.place.group);
  multiply(pool, down_.place.at(down_.record), down_.bias, between, out);
  if (share_ == nullptr) return;
  for (int t = 0; t < tokens; ++t) {
    const float factor = share_of(x + t * width);
    for (std::size_t d = 0; d < width; ++d) out[t * width + d] *= factor;
  }
}

void RouterBlock::run(DecodeMemory& memory, const float* x, float* logits, float* weights,
                      std::int64_t* ids) const {
  decode_kernels().gemv(weight, x, width, 0, experts, logits);
  float* const shares = memory.scores.floats(experts);
  std::memcpy(shares, logits, sizeof(float) * experts);
  decode_kernels().softmax(shares, experts);
  float total = 0;
  for (int i = 0; i < k; ++i) {
    int best = -1;
    for (int e = 0; e < experts; ++e) {
      const bool taken = std::find(ids, ids + i, e) != ids + i;
      if (!taken && (best < 0 || shares[e] > shares[best])) best = e;
    }
    ids[i] = best;
    weights[i] = shares[best];
    total += shares[best];
  }
  if (normalized)
    for (int i = 0; i < k; ++i) weights[i] /= total;
}

std::vector<int> LinearMap::highest(DecodeMemory& memory, const float* x, int count) const {
  float* const scores = memory.scores.floats(experts);
  decode_kernels().gemv(weight, x, width, 0, experts, scores);
  float factor = 1;
  if (eps >= 0) {
    float squares = 0;
    decode_kernels().gemv(x, x, width, 0, 1, &squares);
    factor = 1 / std::sqrt(squares / static_cast<float>(width) + eps);
  }
  std::vector<int> ids(experts);
  for (int e = 0; e < experts; ++e) {
    ids[e] = e;
    scores[e] = scores[e] * factor + bias[e];
    if (std::isnan(scores[e])) scores[e] = -INFINITY;  // cannot be sorted
  }
  std::partial_sort(ids.begin(), ids.begin() + count, ids.end(), [&](int a, int b) {
    return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
  });
  ids.resize(count);
  return ids;
}

}  // namespace fate
