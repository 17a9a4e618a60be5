#include "token_run.h"

#include <algorithm>
#include <chrono>

namespace fate {

void TokenRun::begin(const Passage& passage) {
  passage_ = passage;
  at_ = 0;
  x_ = passage_.x;
  is_stopped_ = is_dense_open_ = false;
  awaited_.clear();
}

std::size_t TokenRun::advance(Pool& pool, DecodeMemory& memory, bool stops_always) {
  const auto began = std::chrono::steady_clock::now();
  const auto passed = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  };
  if (is_stopped_) complete(pool, memory);
  while (!is_done()) {
    const RunLayer& layer = layers_[at_];
    const int width = layer.around.q.place.cols;
    y_ = at_ + 1 == layers_.size() ? passage_.out : hidden_[at_ % 2].floats(width);
    layer.around.layer(pool, memory, x_, passage_.cos, passage_.sin, passage_.caches[at_], y_,
                       passage_.normed);
    if (layer.dense != nullptr) layer.dense->start(pool, passage_.normed);  // other cores begin
    is_dense_open_ = layer.dense != nullptr;
    if (layer.router.experts > 0) {
      double* const times = passage_.times + 2 * at_;
      choose(pool, memory, layer);
      times[0] = passed();
      std::vector<Arrived> placed;
      if (!stops_always) placed = placed_experts(layer);
      is_stopped_ = placed.empty();
      if (is_stopped_) return at_;
      finish_dense(pool, memory);
      compute(pool, placed);
      times[1] = passed();
    }
    complete(pool, memory);
  }
  return at_;
}

void TokenRun::choose(Pool& pool, DecodeMemory& memory, const RunLayer& layer) {
  const int k = layer.router.k;
  std::int64_t* const ids = passage_.ids + at_ * k;
  float* const weights = passage_.weights + at_ * k;
  layer.router.run(memory, passage_.normed, logits_.floats(layer.router.experts), weights, ids);
  step_.begin(pool, layer.shape, passage_.normed, 1, k, ids, weights);
  awaited_.assign(ids, ids + k);
}

// All that the layer at hand has chosen, or nothing where one is missing.
std::vector<Arrived> TokenRun::placed_experts(const RunLayer& layer) const {
  std::vector<Arrived> experts;
  for (int i = 0; i < layer.router.k; ++i) {
    const std::int64_t id = passage_.ids[at_ * layer.router.k + i];
    if (layer.records[id] == nullptr) return {};
    experts.push_back({id, layer.records[id], false});
  }
  return experts;
}

void TokenRun::compute(Pool& pool, const std::vector<Arrived>& arrived) {
  step_.run(pool, arrived);
  for (const Arrived& one : arrived)
    awaited_.erase(std::remove(awaited_.begin(), awaited_.end(), one.expert), awaited_.end());
}

void TokenRun::finish_dense(Pool& pool, DecodeMemory& memory) {
  if (!is_dense_open_) return;
  is_dense_open_ = false;
  layers_[at_].dense->finish(pool, memory, dense_.floats(width()));
}

// Add the feed-forward's parts, the experts' first, as they are added one by one.
void TokenRun::complete(Pool& pool, DecodeMemory& memory) {
  const RunLayer& layer = layers_[at_];
  finish_dense(pool, memory);
  float* const sum = grown_.floats(width());
  if (layer.router.experts > 0) step_.finish(pool, sum);
  const float* const grown = layer.router.experts > 0 ? sum : nullptr;
  const float* const dense = layer.dense == nullptr ? nullptr : dense_.floats(width());
  for (int d = 0; d < width(); ++d) {
    if (grown == nullptr) y_[d] += dense[d];
    else y_[d] += dense == nullptr ? grown[d] : grown[d] + dense[d];
  }
  x_ = y_;
  is_stopped_ = false;
  ++at_;
}

}  // namespace fate
