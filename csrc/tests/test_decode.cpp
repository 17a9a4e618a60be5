// What is computed for one token around the experts, without Python: beside the
// same in doubles, with matrices of codes and of floats, odd shapes, every instruction set.
#include <cstring>
#include <string>

#include "attention.h"
#include "record.h"
#include "token_run.h"

namespace {

using namespace fate;

std::vector<float> random_values(std::size_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = random_value();
  return values;
}

// A projection of codes or of floats, and its weights as doubles.
struct Matrices {
  std::vector<Record> records;
  std::vector<std::vector<float>> floats;
  std::vector<std::vector<double>> exact;

  Projection add(int rows, int cols, bool codes) {
    exact.emplace_back(1ul * rows * cols);
    floats.push_back(random_values(1ul * rows * cols));
    records.emplace_back(rows, cols, 32, 4);
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < cols; ++c)
        exact.back()[1ul * r * cols + c] =
            codes ? records.back().weight(r, c, 4) : floats.back()[1ul * r * cols + c];
    if (codes) return {records.back().place, records.back().bytes.get(), nullptr, nullptr, nullptr};
    return {{rows, cols, 0, 0, 0, 0, 0, 0}, nullptr, floats.back().data(), nullptr, nullptr};
  }

  std::vector<double> times(std::size_t which, const std::vector<double>& x) const {
    const std::vector<double>& w = exact[which];
    std::vector<double> y(w.size() / x.size(), 0.0);
    for (std::size_t r = 0; r < y.size(); ++r)
      for (std::size_t c = 0; c < x.size(); ++c) y[r] += w[r * x.size() + c] * x[c];
    return y;
  }
};

void compare(const std::vector<float>& got, const std::vector<double>& want, double bound,
             const char* what, const char* isa) {
  double off = 0, norm = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    off += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  expect(off <= bound * bound * norm, what, isa, static_cast<int>(want.size()));
}

void check_dense(Pool& pool, const char* isa, int width, int inner, bool codes, bool shared) {
  Matrices own;
  own.records.reserve(3), own.floats.reserve(3);
  const Projection gate = own.add(inner, width, codes), up = own.add(inner, width, codes);
  const Projection down = own.add(width, inner, codes);
  const std::vector<float> x = random_values(width), share = random_values(width);
  DenseBlock block(gate, up, down, {Act::kSilu, 1.0f, INFINITY, 0.0f, false},
                   shared ? share.data() : nullptr);
  DecodeMemory memory;
  std::vector<float> got(width, NAN);
  block.start(pool, x.data());
  block.finish(pool, memory, got.data());

  const auto met = [&](const std::vector<float>& values) {
    return codes ? rounded(values, 1, static_cast<int>(values.size()), 32)
                 : std::vector<double>(values.begin(), values.end());
  };
  const auto wanted = [&](const std::vector<float>& token) {
    const std::vector<double> gates = own.times(0, met(token)), ups = own.times(1, met(token));
    std::vector<float> between(inner);
    for (int i = 0; i < inner; ++i)
      between[i] = static_cast<float>(gates[i] * ups[i] / (1 + std::exp(-gates[i])));
    std::vector<double> want = own.times(2, met(between));
    double score = 0;
    for (int i = 0; i < width; ++i) score += 1.0 * token[i] * share[i];
    if (shared)
      for (double& value : want) value /= 1 + std::exp(-score);
    return want;
  };
  // A value midway between two codes may go either way.
  compare(got, wanted(x), codes ? 3e-3 : 1e-5, "dense", isa);
  block.start(pool, share.data());  // another token, left unfinished by an error
  block.start(pool, x.data());
  block.finish(pool, memory, got.data());
  compare(got, wanted(x), codes ? 3e-3 : 1e-5, "dense started twice", isa);
  if (!codes) return;
  const std::vector<float> four = random_values(4ul * width);
  std::vector<float> out(four.size(), NAN);
  block.many(pool, memory, four.data(), 4, out.data());
  for (int from = 0; from < 4 * width; from += width)
    compare({out.begin() + from, out.begin() + from + width},
            wanted({four.begin() + from, four.begin() + from + width}), 3e-3, "many", isa);
}

// Weights of bfloat16: the same bits for a token whether it comes alone or among others, and those
// of the same weights as floats.
void check_bfloats(Pool& pool, const char* isa, int rows, int cols, int tokens) {
  std::vector<std::uint16_t> narrow(1ul * rows * cols);
  std::vector<float> wide(narrow.size());
  for (std::size_t i = 0; i < narrow.size(); ++i) {
    const float value = random_value();
    std::uint32_t bits = 0;
    std::memcpy(&bits, &value, 4);
    narrow[i] = static_cast<std::uint16_t>(bits >> 16);
    bits &= 0xffff0000u;
    std::memcpy(&wide[i], &bits, 4);
  }
  const std::vector<float> x = random_values(1ul * tokens * cols), bias = random_values(rows);
  const MatrixPlace place{rows, cols, 0, 0, 0, 0, 0, 0};
  const Projection matrix{place, nullptr, nullptr, narrow.data(), bias.data()};
  const Projection floats{place, nullptr, wide.data(), nullptr, bias.data()};
  std::vector<float> all(1ul * tokens * rows, NAN), one(rows, NAN), other(rows, NAN);
  project(pool, matrix, x.data(), tokens, all.data());
  for (int t = 0; t < tokens; ++t) {
    project(pool, matrix, x.data() + 1ul * t * cols, 1, one.data());
    project(pool, floats, x.data() + 1ul * t * cols, 1, other.data());
    expect(std::memcmp(one.data(), other.data(), 4ul * rows) == 0, "bfloat16 and float differ", isa, cols);
    expect(std::memcmp(one.data(), all.data() + 1ul * t * rows, 4ul * rows) == 0,
           "a token alone and among others differ", isa, t);
    std::vector<double> want(rows, 0.0);
    for (int r = 0; r < rows; ++r) {
      want[r] = bias[r];
      for (int c = 0; c < cols; ++c) want[r] += 1.0 * wide[1ul * r * cols + c] * x[1ul * t * cols + c];
    }
    compare(one, want, 1e-5, "bfloat16", isa);
  }
}

void check_attend(Pool& pool, const char* isa, int heads, int kv_heads, int dim, int length) {
  const int rotary = dim / 2 / 2 * 2, rows = length + 1;
  std::vector<float> q = random_values(1ul * heads * dim), k = random_values(1ul * kv_heads * dim);
  const std::vector<float> v = random_values(k.size()), angle = random_values(rotary / 2);
  std::vector<float> cos(rotary), sin(rotary), keys = random_values(1ul * kv_heads * rows * dim);
  std::vector<float> values = random_values(keys.size());
  for (int i = 0; i < rotary; ++i) cos[i] = std::cos(angle[i % (rotary / 2)]);
  for (int i = 0; i < rotary; ++i) sin[i] = std::sin(angle[i % (rotary / 2)]);
  const auto turned = [&](const std::vector<float>& x) {
    std::vector<double> y(x.begin(), x.end());
    for (std::size_t from = 0; from < x.size(); from += dim)
      for (int i = 0; i < rotary / 2; ++i) {
        const double a = x[from + i], b = x[from + rotary / 2 + i];
        y[from + i] = a * cos[i] - b * sin[i];
        y[from + rotary / 2 + i] = b * cos[i] + a * sin[i];
      }
    return y;
  };
  const std::vector<double> queries = turned(q), fresh = turned(k);
  const AttentionShape shape{heads, kv_heads, dim, rotary, 0.3f, {nullptr, 0}, {nullptr, 0}, false};
  const auto attend_with = [&](Pool& cores) {
    std::vector<float> turned_q = q, turned_k = k, own_keys = keys, own_values = values;
    std::vector<float> out(q.size(), NAN);
    DecodeMemory memory;
    const CachePlace cache{own_keys.data(), own_values.data(), 1ul * rows * dim, length};
    attend(cores, memory, shape, turned_q.data(), turned_k.data(), v.data(), cos.data(), sin.data(),
           cache, out.data());
    for (int kv = 0; kv < kv_heads; ++kv) {
      const std::size_t at = (1ul * kv * rows + length) * dim;
      expect(std::memcmp(own_values.data() + at, v.data() + kv * dim, 4ul * dim) == 0 &&
                 std::memcmp(own_keys.data() + at, turned_k.data() + kv * dim, 4ul * dim) == 0,
             "the new token is not in the cache", isa, kv);
    }
    return out;
  };
  const std::vector<float> got = attend_with(pool);
  for (const int threads : {1, 2}) {  // parts of heads, where these do not divide evenly
    Pool cores(threads);
    const std::vector<float> other = attend_with(cores);
    expect(std::memcmp(got.data(), other.data(), 4ul * got.size()) == 0,
           "attention depends on how many cores compute it", isa, length);
  }

  std::vector<double> want(got.size(), 0.0);
  for (int head = 0; head < heads; ++head) {
    const int kv = head / (heads / kv_heads);
    std::vector<double> shares(rows);
    double total = 0;
    for (int t = 0; t < rows; ++t) {
      double score = 0;
      for (int d = 0; d < dim; ++d)
        score += queries[head * dim + d] *
                 (t == length ? fresh[kv * dim + d] : keys[(1ul * kv * rows + t) * dim + d]);
      total += shares[t] = std::exp(0.3 * score);
    }
    for (int t = 0; t < rows; ++t)
      for (int d = 0; d < dim; ++d)
        want[head * dim + d] +=
            shares[t] / total * (t == length ? v[kv * dim + d] : values[(1ul * kv * rows + t) * dim + d]);
  }
  compare(got, want, 1e-5, "attention", isa);
}

// One layer with experts and a shared one, one without experts: a run beside its parts, one by one.
void check_run(Pool& pool, const char* isa, int width, int inner) {
  constexpr int kHeads = 2, kExperts = 5, kChosen = 2, kLayers = 2, kRows = 4;
  const int dim = width / kHeads;
  Matrices own;
  own.records.reserve(20), own.floats.reserve(20);
  const std::vector<float> norm = random_values(width), gate = random_values(1ul * kExperts * width);
  const AttentionShape heads{kHeads, kHeads, dim, 0, 0.3f, {nullptr, 0}, {nullptr, 0}, false};
  const Gate form{Act::kSilu, 1.0f, INFINITY, 0.0f, false};
  const auto around = [&] {
    const Projection q = own.add(width, width, true), k = own.add(width, width, false);
    const Projection v = own.add(width, width, true), o = own.add(width, width, true);
    return AttentionBlock{heads, q, k, v, o, {norm.data(), 1e-5f}, {norm.data(), 1e-5f}, 1.0f};
  };
  const auto dense_of = [&](const float* share) {
    const Projection in = own.add(inner, width, true), up = own.add(inner, width, true);
    return DenseBlock(in, up, own.add(width, inner, true), form, share);
  };
  const AttentionBlock first = around(), second = around();
  DenseBlock shared = dense_of(gate.data()), plain = dense_of(nullptr);
  const RouterBlock router{gate.data(), kExperts, width, kChosen, true};

  const Record up(2 * inner, width, 32, 4), down(width, inner, 32, 4);
  const std::size_t up_bytes = up.place.low + 2ul * inner * width / 4;
  const std::size_t bytes = up_bytes + down.place.low + 1ul * width * inner / 4;
  std::vector<std::vector<std::uint8_t>> experts(kExperts, std::vector<std::uint8_t>(bytes));
  MatrixPlace below = down.place;
  for (std::size_t* at : {&below.scale, &below.zero, &below.high, &below.low}) *at += up_bytes;
  const ExpertShape shape{up.place, below, true, false, form, -1, -1};
  std::vector<const std::uint8_t*> records;
  for (std::vector<std::uint8_t>& one : experts) {
    std::memcpy(one.data(), up.bytes.get(), up_bytes);
    std::memcpy(one.data() + up_bytes, down.bytes.get(), bytes - up_bytes);
    for (std::size_t i = 0; i < 1ul * width * inner / 4; ++i)  // else all would be the same
      one[up.place.high + i] = static_cast<std::uint8_t>(random_bits());
    records.push_back(one.data());
  }

  const std::vector<float> history = random_values(1ul * kHeads * kRows * dim);
  std::vector<std::vector<float>> keys(2 * kLayers, history), values = keys;
  std::vector<CachePlace> caches;
  for (int l = 0; l < 2 * kLayers; ++l)
    caches.push_back({keys[l].data(), values[l].data(), 1ul * kRows * dim, kRows - 1});
  const std::vector<float> x = random_values(width);
  DecodeMemory memory;

  std::vector<float> y(width), normed(width), grown(width), extra(width), want(width), logits(kExperts);
  std::vector<float> weights(kChosen);
  std::vector<std::int64_t> ids(kChosen);
  first.layer(pool, memory, x.data(), nullptr, nullptr, caches[0], y.data(), normed.data());
  shared.start(pool, normed.data());
  router.run(memory, normed.data(), logits.data(), weights.data(), ids.data());
  shared.finish(pool, memory, extra.data());
  ExpertStep step;
  step.begin(pool, shape, normed.data(), 1, kChosen, ids.data(), weights.data());
  for (const std::int64_t id : ids) step.run(pool, {{id, records[id], false}});
  step.finish(pool, grown.data());
  for (int d = 0; d < width; ++d) y[d] += grown[d] + extra[d];
  second.layer(pool, memory, y.data(), nullptr, nullptr, caches[1], want.data(), normed.data());
  plain.start(pool, normed.data());
  plain.finish(pool, memory, extra.data());
  for (int d = 0; d < width; ++d) want[d] += extra[d];

  TokenRun run;
  run.add({first, router, shape, &shared, std::vector<const std::uint8_t*>(kExperts, nullptr)});
  run.add({second, {nullptr, 0, 0, 0, false}, {}, &plain, {}});
  expect(run.experts(0) == kExperts && run.experts(1) == 0, "counts experts", isa);
  const auto place_all = [&] {
    for (int e = 0; e < kExperts; ++e) run.place(0, e, records[e]);
  };
  for (const int missing : {-1, -2, static_cast<int>(ids[1])}) {
    const bool stops_always = missing == -2;  // with everything there
    const bool stops = stops_always || missing >= 0;
    place_all();
    if (missing >= 0) run.place(0, missing, nullptr);
    std::vector<float> got(width, NAN), seen(width), shares(kLayers * kChosen);
    std::vector<std::int64_t> chosen(kLayers * kChosen);
    std::vector<double> times(2 * kLayers);
    for (int l = kLayers; l < 2 * kLayers; ++l) keys[l] = values[l] = history;
    run.begin({x.data(), nullptr, nullptr, {caches[2], caches[3]}, got.data(), seen.data(),
               chosen.data(), shares.data(), times.data()});
    if (stops) {
      expect(run.advance(pool, memory, stops_always) == 0 && run.is_stopped(), "does not stop", isa);
      run.finish_dense(pool, memory);
      for (int i = 0; i < kChosen; ++i) {
        expect(run.awaited().size() == 1ul * kChosen - i, "awaits other experts", isa, i);
        run.compute(pool, {{chosen[i], records[chosen[i]], false}});
      }
    }
    expect(run.advance(pool, memory, stops_always) == kLayers && run.is_done(), "does not end", isa);
    expect(stops || times[1] >= times[0], "times go backward", isa);
    expect(std::memcmp(got.data(), want.data(), 4ul * width) == 0, "a run differs from its layers", isa, width);
  }
  for (int l = 0; l < kLayers; ++l)
    expect(keys[l] == keys[kLayers + l] && values[l] == values[kLayers + l],
           "a run caches something else", isa, l);
}

}  // namespace

int main(int count, char** names) {
  expect_best(count > 1 ? names[1] : nullptr);
  Pool pool(3);
  for (const Kernels* kernels : available()) {
    use(kernels->name);
    for (const bool codes : {false, true})
      for (const bool shared : {false, true})
        for (const auto& [width, inner] : std::vector<std::pair<int, int>>{{32, 64}, {160, 96}, {288, 352}})
          check_dense(pool, kernels->name, width, inner, codes, shared);
    for (const auto& [rows, cols] : std::vector<std::pair<int, int>>{{1, 1}, {7, 33}, {40, 64}, {259, 100}})
      for (const int tokens : {1, 2, 6, 7, 61}) check_bfloats(pool, kernels->name, rows, cols, tokens);
    for (const auto& [heads, kv_heads] : std::vector<std::pair<int, int>>{{1, 1}, {4, 2}, {6, 1}, {15, 3}})
      for (const int dim : {4, 20, 64, 100})
        for (const int length : {0, 1, 7, 300, 510, 511, 769})
          check_attend(pool, kernels->name, heads, kv_heads, dim, length);
    for (const auto& [width, inner] : std::vector<std::pair<int, int>>{{32, 32}, {160, 96}, {256, 320}})
      check_run(pool, kernels->name, width, inner);
    std::printf("%s: tried\n", kernels->name);
  }
  std::printf(failures ? "%d failures\n" : "all as it should be\n", failures);
  return failures ? 1 : 0;
}
