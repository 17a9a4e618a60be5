#include "token_run.h"

namespace fate {

void TokenRun::place(const std::vector<std::vector<const std::uint8_t*>>& records) {
  for (std::size_t l = 0; l < layers_.size(); ++l) layers_[l].records = records[l];
  placed_ = true;
}

void TokenRun::step(Pool& pool, DecodeMemory& memory, const float* x, const float* cos,
                    const float* sin, const std::vector<CachePlace>& caches, float* out) {
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    const RunLayer& layer = layers_[l];
    const int width = layer.around.q.place.cols;
    float* const normed = normed_.floats(width);
    float* const y = l + 1 == layers_.size() ? out : hidden_[l % 2].floats(width);
    layer.around.layer(pool, memory, x, cos, sin, caches[l], y, normed);
    const float* const grown = feed_forward(pool, memory, layer, normed);
    for (int d = 0; d < width; ++d) y[d] += grown[d];
    x = y;
  }
}

const float* TokenRun::feed_forward(Pool& pool, DecodeMemory& memory, const RunLayer& layer,
                                    const float* x) {
  const int width = layer.around.q.place.cols;
  float* const dense = dense_.floats(width);
  if (layer.dense != nullptr) layer.dense->start(pool, x);  // other cores begin
  if (layer.router.experts == 0) {
    layer.dense->finish(pool, memory, dense);
    return dense;
  }
  const int k = layer.router.k;
  ids_.resize(k);
  float* const weights = weights_.floats(k);
  layer.router.run(memory, x, logits_.floats(layer.router.experts), weights, ids_.data());
  if (layer.dense != nullptr) layer.dense->finish(pool, memory, dense);
  std::vector<Arrived> experts;
  for (const std::int64_t id : ids_) experts.push_back({id, layer.records[id], false});
  float* const grown = grown_.floats(width);
  step_.begin(pool, layer.shape, x, 1, k, ids_.data(), weights);
  step_.run(pool, experts);
  step_.finish(pool, grown);
  if (layer.dense != nullptr)
    for (int d = 0; d < width; ++d) grown[d] += dense[d];
  return grown;
}

}  // namespace fate
