// What was seen of one layer's experts, and who of them stays? The arithmetic of cache/transition.py,
// whose words and constants these are; in the same order, so that both give the same bits.
#pragma once

#include <cstdint>
#include <vector>

namespace fate {

struct TransitionShape {
  double kept, following, before_last, unsure, in_use;
};

class TransitionLayer {
 public:
  explicit TransitionLayer(const TransitionShape& shape) : shape_(shape) {}

  // Take in a step of one token that chose these.
  void step(const std::vector<int>& experts);
  // Take in a step of many; `counts` are tokens of each expert, or one 1 for all.
  void read(const std::vector<int>& experts, const std::vector<double>& counts, int tokens);

  void enter(int expert);
  // False: it was not there.
  bool leave(int expert);
  bool holds(int expert) const;
  // The residents, the least worth first; of equals the one that came first.
  const std::vector<int>& ranking();
  double worth(int expert);

 private:
  struct Past { int expert; float weight; };

  void make_room_for(int expert);
  void note(const std::vector<int>& experts);
  const std::vector<double>& weigh();
  float& follows(int before, int after) { return follows_[1ul * before * size_ + after]; }

  TransitionShape shape_;
  int size_ = 0;  // E, rounded up
  std::vector<float> mean_, seen_, follows_;  // [E], [E], [E, E]
  std::vector<int> last_, now_;
  std::vector<Past> past_;
  std::vector<int> residents_, ranking_;  // in order of coming; by worth
  std::vector<double> worth_;
  bool is_weighed_ = false, is_ranked_ = false;
};

}  // namespace fate
