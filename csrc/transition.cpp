#include "transition.h"

#include <algorithm>
#include <cmath>

namespace fate {
namespace {

constexpr int kGrowth = 32;  // ids that room is made for at once

}  // namespace

void TransitionLayer::make_room_for(int expert) {
  if (expert < size_) return;
  const int size = (expert / kGrowth + 1) * kGrowth;
  std::vector<float> wider(1ul * size * size);
  for (int row = 0; row < size_; ++row)
    std::copy_n(&follows_[1ul * row * size_], size_, &wider[1ul * row * size]);
  follows_.swap(wider);
  mean_.resize(size);
  seen_.resize(size);
  size_ = size;
  is_weighed_ = is_ranked_ = false;
}

void TransitionLayer::note(const std::vector<int>& experts) {
  if (!experts.empty()) make_room_for(*std::max_element(experts.begin(), experts.end()));
  now_ = experts;
  is_weighed_ = is_ranked_ = false;
}

void TransitionLayer::step(const std::vector<int>& experts) {
  note(experts);
  for (const Past& one : past_) {
    for (const int chosen : experts) follows(one.expert, chosen) += one.weight;
    seen_[one.expert] += one.weight;
  }
  past_.clear();
  for (const int expert : last_) past_.push_back({expert, static_cast<float>(shape_.before_last)});
  const std::size_t older = past_.size();
  for (const int expert : experts) {
    const auto end = past_.begin() + static_cast<std::ptrdiff_t>(older);
    const auto found = std::find_if(past_.begin(), end, [&](const Past& p) { return p.expert == expert; });
    if (found != end) found->weight = static_cast<float>(shape_.before_last + 1.0);
    else past_.push_back({expert, 1.0f});
  }
  last_ = experts;
  const float kept = static_cast<float>(shape_.kept), added = static_cast<float>(1 - shape_.kept);
  for (float& mean : mean_) mean *= kept;
  for (const int expert : experts) mean_[expert] += added;
}

void TransitionLayer::read(const std::vector<int>& experts, const std::vector<double>& counts,
                           int tokens) {
  note(experts);
  const double kept = std::pow(shape_.kept, tokens), share = (1 - kept) / tokens;
  for (float& mean : mean_) mean *= static_cast<float>(kept);
  for (std::size_t i = 0; i < experts.size(); ++i) {
    float& mean = mean_[experts[i]];
    mean = static_cast<float>(mean + share * counts[counts.size() == 1 ? 0 : i]);
  }
  last_.clear();
  past_.clear();
}

void TransitionLayer::enter(int expert) {
  make_room_for(expert);
  if (!holds(expert)) residents_.push_back(expert);
  is_ranked_ = false;
}

bool TransitionLayer::leave(int expert) {
  const auto found = std::find(residents_.begin(), residents_.end(), expert);
  if (found == residents_.end()) return false;
  residents_.erase(found);
  if (is_ranked_) ranking_.erase(std::find(ranking_.begin(), ranking_.end(), expert));
  return true;
}

bool TransitionLayer::holds(int expert) const {
  return std::find(residents_.begin(), residents_.end(), expert) != residents_.end();
}

const std::vector<int>& TransitionLayer::ranking() {
  if (!is_ranked_) {
    const std::vector<double>& worth = weigh();
    ranking_ = residents_;
    std::stable_sort(ranking_.begin(), ranking_.end(),
                     [&](int a, int b) { return worth[a] < worth[b]; });
    is_ranked_ = true;
  }
  return ranking_;
}

double TransitionLayer::worth(int expert) {
  make_room_for(expert);
  return weigh()[expert];
}

const std::vector<double>& TransitionLayer::weigh() {
  if (is_weighed_) return worth_;
  std::vector<float> next(size_, 0.0f);
  for (const Past& one : past_) {
    const float share = one.weight / (seen_[one.expert] + static_cast<float>(shape_.unsure));
    const float* row = &follows_[1ul * one.expert * size_];
    for (int e = 0; e < size_; ++e) next[e] += share * row[e];
  }
  worth_.resize(size_);
  const float following = static_cast<float>(shape_.following);
  for (int e = 0; e < size_; ++e) worth_[e] = mean_[e] + following * next[e];
  for (const int expert : now_) worth_[expert] += shape_.in_use;
  is_weighed_ = true;
  return worth_;
}

}  // namespace fate
