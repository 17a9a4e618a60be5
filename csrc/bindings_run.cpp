// What does Python see of a token's way through many layers? As in bindings.cpp, addresses.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "shared.h"
#include "token_run.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using fate::Address;
using fate::at;
using fate::need;
using Row = std::tuple<Address, Address, std::size_t, int>;  // keys, values, stride, length

void need_fit(const fate::TokenRun& run, const fate::AttentionBlock& around,
              const fate::DenseBlock* dense) {
  const int width = around.q.place.cols;
  need(run.layers() == 0 || run.width() == width, "the layers of a run differ in width");
  need(dense == nullptr || dense->width() == width, "the parts of a layer differ in width");
  need(around.before.weight && around.after.weight, "a layer needs both norms");
  need(around.residual == 1.0f, "a layer of a run adds its parts as they are");
}

void add_sparse(fate::TokenRun& run, const fate::AttentionBlock& around,
                const fate::RouterBlock& router, const fate::ExpertShape& shape,
                fate::DenseBlock* dense) {
  const int width = around.q.place.cols;
  need_fit(run, around, dense);
  need(router.width == width && shape.up.cols == width, "the parts of a layer differ in width");
  run.add({around, router, shape, dense,
           std::vector<const std::uint8_t*>(router.experts, nullptr)});
}

void add_dense(fate::TokenRun& run, const fate::AttentionBlock& around, fate::DenseBlock* dense) {
  need_fit(run, around, dense);
  need(dense != nullptr, "a layer needs a feed-forward");
  run.add({around, {nullptr, 0, 0, 0, false}, {}, dense, {}});
}

// Each: layer, expert, where its record lies; 0: nowhere.
using Moved = std::tuple<std::size_t, std::size_t, Address>;

void place(fate::TokenRun& run, const std::vector<Moved>& moved) {
  for (const auto& [layer, expert, address] : moved)
    need(layer < run.layers() && expert < run.experts(layer), "no such expert in this run");
  fate::Locked our;
  for (const auto& [layer, expert, address] : moved)
    run.place(layer, expert, at<std::uint8_t>(address));
}

void begin(fate::TokenRun& run, Address x, Address cos, Address sin, const std::vector<Row>& rows,
           Address out, Address normed, Address ids, Address weights, Address times) {
  need(rows.size() == run.layers(), "need a row of the cache for each layer");
  std::vector<fate::CachePlace> caches;
  for (const auto& [keys, values, stride, length] : rows)
    caches.push_back({at<float>(keys), at<float>(values), stride, length});
  fate::Locked our;
  run.begin({at<float>(x), at<float>(cos), at<float>(sin), std::move(caches), at<float>(out),
             at<float>(normed), at<std::int64_t>(ids), at<float>(weights), at<double>(times)});
}

std::size_t advance(fate::TokenRun& run, bool stops_always) {
  fate::Locked our;
  need(!run.is_stopped() || run.awaited().empty(), "need all experts where it stopped");
  return run.advance(our.pool, our.memory, stops_always);
}

// Each: expert, where its record lies, whether only its INT2 head counts.
void compute(fate::TokenRun& run, const std::vector<std::tuple<std::int64_t, Address, bool>>& arrived) {
  std::vector<fate::Arrived> experts;
  for (const auto& [expert, address, head_only] : arrived)
    experts.push_back({expert, at<std::uint8_t>(address), head_only});
  fate::Locked our;
  need(run.is_stopped(), "no experts are needed");
  std::vector<std::int64_t> left = run.awaited();
  for (const fate::Arrived& one : experts) {
    const auto found = std::find(left.begin(), left.end(), one.expert);
    need(found != left.end() && one.record != nullptr, "no such expert is needed");
    left.erase(found);
  }
  run.compute(our.pool, experts);
}

void finish_dense(fate::TokenRun& run) {
  fate::Locked our;
  run.finish_dense(our.pool, our.memory);
}

}  // namespace

void bind_run(nb::module_& m) {
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<fate::TokenRun>(m, "TokenRun")
      .def(nb::init<>())
      .def("add", &add_sparse, "around"_a, "router"_a, "shape"_a, "dense"_a.none(),
           nb::keep_alive<1, 5>())
      .def("add_dense", &add_dense, "around"_a, "dense"_a, nb::keep_alive<1, 3>())
      .def("place", &place, "moved"_a, Unlocked())
      .def("begin", &begin, "x"_a, "cos"_a, "sin"_a, "rows"_a, "out"_a, "normed"_a, "ids"_a,
           "weights"_a, "times"_a, Unlocked())
      .def("advance", &advance, "stops_always"_a, Unlocked())
      .def("compute", &compute, "arrived"_a, Unlocked())
      .def("finish_dense", &finish_dense, Unlocked());
}
