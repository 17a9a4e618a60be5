#include "token_run.h"

#include <chrono>

namespace fate {

void TokenRun::begin(const Passage& passage) {
  passage_ = passage;
  at_ = 0;
  x_ = passage_.x;
  is_stopped_ = is_dense_open_ = false;
}

std::size_t TokenRun::advance(Pool& pool, DecodeMemory& memory, const float* grown) {
  const auto began = std::chrono::steady_clock::now();
  const auto passed = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  };
  if (is_stopped_) {
    finish_dense(pool, memory);
    complete(grown);
  }
  while (!is_done()) {
    const RunLayer& layer = layers_[at_];
    const int width = layer.around.q.place.cols;
    y_ = at_ + 1 == layers_.size() ? passage_.out : hidden_[at_ % 2].floats(width);
    layer.around.layer(pool, memory, x_, passage_.cos, passage_.sin, passage_.caches[at_], y_,
                       passage_.normed);
    if (layer.dense != nullptr) layer.dense->start(pool, passage_.normed);  // other cores begin
    is_dense_open_ = layer.dense != nullptr;
    float* const sum = grown_.floats(width);
    if (layer.router.experts > 0) {
      const std::size_t first = at_ * layer.router.k;
      layer.router.run(memory, passage_.normed, logits_.floats(layer.router.experts),
                       passage_.weights + first, passage_.ids + first);
      passage_.times[2 * at_] = passed();
      is_stopped_ = !is_placed(layer);
      if (is_stopped_) return at_;
      finish_dense(pool, memory);
      compute_experts(pool, layer, sum);
      passage_.times[2 * at_ + 1] = passed();
    }
    finish_dense(pool, memory);
    complete(layer.router.experts > 0 ? sum : nullptr);
  }
  return at_;
}

void TokenRun::finish_dense(Pool& pool, DecodeMemory& memory) {
  if (!is_dense_open_) return;
  is_dense_open_ = false;
  layers_[at_].dense->finish(pool, memory, dense_.floats(width()));
}

bool TokenRun::is_placed(const RunLayer& layer) const {
  for (int i = 0; i < layer.router.k; ++i)
    if (layer.records[passage_.ids[at_ * layer.router.k + i]] == nullptr) return false;
  return true;
}

void TokenRun::compute_experts(Pool& pool, const RunLayer& layer, float* grown) {
  const int k = layer.router.k;
  const std::int64_t* const ids = passage_.ids + at_ * k;
  std::vector<Arrived> experts;
  for (int i = 0; i < k; ++i) experts.push_back({ids[i], layer.records[ids[i]], false});
  step_.begin(pool, layer.shape, passage_.normed, 1, k, ids, passage_.weights + at_ * k);
  step_.run(pool, experts);
  step_.finish(pool, grown);
}

// Add the feed-forward's parts, the experts' first, as they are added one by one.
void TokenRun::complete(const float* grown) {
  const float* const dense = layers_[at_].dense == nullptr ? nullptr : dense_.floats(width());
  for (int d = 0; d < width(); ++d) {
    if (grown == nullptr) y_[d] += dense[d];
    else y_[d] += dense == nullptr ? grown[d] : grown[d] + dense[d];
  }
  x_ = y_;
  is_stopped_ = false;
  ++at_;
}

}  // namespace fate
