// What does Python see of the arithmetic of a cache?
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "transition.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

constexpr int kMostExperts = 1 << 15;  // memory grows with the square

int checked(int expert) {
  if (expert < 0 || expert >= kMostExperts) throw std::invalid_argument("expert: out of range");
  return expert;
}

const std::vector<int>& checked(const std::vector<int>& experts) {
  for (const int expert : experts) checked(expert);
  return experts;
}

}  // namespace

void bind_cache(nb::module_& m) {
  using fate::TransitionLayer;
  nb::class_<TransitionLayer>(m, "TransitionLayer")
      .def("__init__",
           [](TransitionLayer* self, double kept, double following, double before_last,
              double unsure, double in_use) {
             new (self) TransitionLayer({kept, following, before_last, unsure, in_use});
           },
           "kept"_a, "following"_a, "before_last"_a, "unsure"_a, "in_use"_a)
      .def("step", [](TransitionLayer& self, const std::vector<int>& experts) {
             self.step(checked(experts));
           }, "experts"_a)
      .def("read",
           [](TransitionLayer& self, const std::vector<int>& experts,
              const std::vector<double>& counts, int tokens) {
             if (tokens < 1 || (counts.size() != 1 && counts.size() != experts.size()))
               throw std::invalid_argument("counts: need one, or one for each expert");
             self.read(checked(experts), counts, tokens);
           },
           "experts"_a, "counts"_a, "tokens"_a)
      .def("enter", [](TransitionLayer& self, int expert) { self.enter(checked(expert)); },
           "expert"_a)
      .def("leave", [](TransitionLayer& self, int expert) {
             if (!self.leave(expert)) throw nb::key_error("expert: not resident");
           }, "expert"_a)
      .def("ranking", &TransitionLayer::ranking)
      .def("worth", [](TransitionLayer& self, int expert) { return self.worth(checked(expert)); },
           "expert"_a);
}
