// How does one token go through decoder layers whose experts are all in memory, in one piece?
//
// What is done for a layer, and in which order numbers are added, is what the parts do one by one:
// the result has the same bits.
#pragma once

#include <vector>

#include "attention.h"

namespace fate {

// x + attention(norm(x)), then that + feed-forward(norm(that)).
struct RunLayer {
  AttentionBlock around;
  RouterBlock router;  // of no experts: the feed-forward is `dense` alone
  ExpertShape shape;
  DenseBlock* dense;   // a shared expert, or null
  std::vector<const std::uint8_t*> records;  // of each expert, [E]
};

class TokenRun {
 public:
  void add(const RunLayer& layer) { layers_.push_back(layer); }
  // Say where the records of all experts of all layers lie.
  void place(const std::vector<std::vector<const std::uint8_t*>>& records);
  bool is_placed() const { return placed_; }
  int width() const { return layers_.empty() ? 0 : layers_[0].around.q.place.cols; }
  std::size_t layers() const { return layers_.size(); }
  std::size_t experts(std::size_t layer) const { return layers_[layer].router.experts; }

  // x, out [D]; a row of the cache for each layer. All layers turn by the same cos and sin.
  void step(Pool& pool, DecodeMemory& memory, const float* x, const float* cos, const float* sin,
            const std::vector<CachePlace>& caches, float* out);

 private:
  // out = feed-forward(x); null where nothing was computed.
  const float* feed_forward(Pool& pool, DecodeMemory& memory, const RunLayer& layer, const float* x);

  std::vector<RunLayer> layers_;
  bool placed_ = false;
  ExpertStep step_;
  Buffer hidden_[2], normed_, grown_, dense_, logits_, weights_;
  std::vector<std::int64_t> ids_;
};

}  // namespace fate
