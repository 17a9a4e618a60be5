// What does Python see of a token's way through many layers? As in bindings.cpp, addresses.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>
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
  run.add({around, router, shape, dense, {}});
}

void add_dense(fate::TokenRun& run, const fate::AttentionBlock& around, fate::DenseBlock* dense) {
  need_fit(run, around, dense);
  need(dense != nullptr, "a layer needs a feed-forward");
  run.add({around, {nullptr, 0, 0, 0, false}, {}, dense, {}});
}

void place(fate::TokenRun& run, const std::vector<std::vector<Address>>& addresses) {
  need(addresses.size() == run.layers(), "need the experts of each layer");
  std::vector<std::vector<const std::uint8_t*>> records(addresses.size());
  for (std::size_t l = 0; l < addresses.size(); ++l) {
    need(addresses[l].size() == run.experts(l), "need all experts of a layer");
    for (const Address one : addresses[l]) records[l].push_back(at<std::uint8_t>(one));
  }
  fate::Locked our;
  run.place(records);
}

void step(fate::TokenRun& run, Address x, Address cos, Address sin, const std::vector<Row>& rows,
          Address out) {
  need(run.is_placed(), "need to know where the experts lie");
  need(rows.size() == run.layers(), "need a row of the cache for each layer");
  std::vector<fate::CachePlace> caches;
  for (const auto& [keys, values, stride, length] : rows)
    caches.push_back({at<float>(keys), at<float>(values), stride, length});
  fate::Locked our;
  run.step(our.pool, our.memory, at<float>(x), at<float>(cos), at<float>(sin), caches,
           at<float>(out));
}

}  // namespace

void bind_run(nb::module_& m) {
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<fate::TokenRun>(m, "TokenRun")
      .def(nb::init<>())
      .def("add", &add_sparse, "around"_a, "router"_a, "shape"_a, "dense"_a.none(),
           nb::keep_alive<1, 5>())
      .def("add_dense", &add_dense, "around"_a, "dense"_a, nb::keep_alive<1, 3>())
      .def("place", &place, "addresses"_a, Unlocked())
      .def("step", &step, "x"_a, "cos"_a, "sin"_a, "rows"_a, "out"_a, Unlocked());
}
