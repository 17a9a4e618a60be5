// How does one token go through decoder layers in one piece, as far as their experts are in memory?
//
// What is done for a layer, and in which order numbers are added, is what the parts do one by one:
// the result has the same bits. At a layer that misses an expert it stops; it computes that layer's
// experts as it is told where they lie, and goes on.
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
  std::vector<const std::uint8_t*> records;  // of each expert, [E]; null: not in memory
};

// One token's way, in memory of the caller's that must stay until the last layer is done.
struct Passage {
  const float* x;                  // [D]
  const float* cos;                // all layers turn by the same
  const float* sin;
  std::vector<CachePlace> caches;  // a row of each layer's
  float* out;                      // [D]
  float* normed;                   // [D]: what the layer's router and experts got
  std::int64_t* ids;               // [layers, K]: what was chosen
  float* weights;                  // [layers, K]
  double* times;                   // [layers, 2]: seconds from the call to the choice, to its end
};

class TokenRun {
 public:
  void add(const RunLayer& layer) { layers_.push_back(layer); }
  // Say where the record of an expert lies; null: nowhere.
  void place(std::size_t layer, std::size_t expert, const std::uint8_t* record) {
    layers_[layer].records[expert] = record;
  }
  int width() const { return layers_.empty() ? 0 : layers_[0].around.q.place.cols; }
  std::size_t layers() const { return layers_.size(); }
  std::size_t experts(std::size_t layer) const { return layers_[layer].router.experts; }

  void begin(const Passage& passage);
  bool is_stopped() const { return is_stopped_; }
  bool is_done() const { return at_ == layers_.size(); }
  // Go on to the next layer that misses an expert, or to the next one that has experts if
  // `stops_always`, and return its number, or to the end. All experts of the layer it stopped at must
  // have been computed.
  std::size_t advance(Pool& pool, DecodeMemory& memory, bool stops_always);
  // The experts of the layer it stopped at that are still to be computed.
  const std::vector<std::int64_t>& awaited() const { return awaited_; }
  // Compute some of them, distinct.
  void compute(Pool& pool, const std::vector<Arrived>& arrived);
  // End what other cores have begun of the layer it stopped at: its shared expert.
  void finish_dense(Pool& pool, DecodeMemory& memory);

 private:
  void choose(Pool& pool, DecodeMemory& memory, const RunLayer& layer);
  std::vector<Arrived> placed_experts(const RunLayer& layer) const;
  void complete(Pool& pool, DecodeMemory& memory);

  std::vector<RunLayer> layers_;
  Passage passage_{};
  std::size_t at_ = 0;        // layers that are done
  const float* x_ = nullptr;  // what entered the layer, and what leaves it
  float* y_ = nullptr;
  bool is_stopped_ = false, is_dense_open_ = false;
  std::vector<std::int64_t> awaited_;
  ExpertStep step_;
  Buffer hidden_[2], grown_, dense_, logits_;
};

}  // namespace fate
