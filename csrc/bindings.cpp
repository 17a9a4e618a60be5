// What does Python see? Addresses and lengths cross here, never tensors; every call that computes
// gives the interpreter's lock back. Whoever passes an address vouches for it: fate_moe/native.py and
// its callers, which hold the tensors alive and have checked their shapes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "shared.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using fate::Address;
using fate::at;
using fate::shared;

void set_threads(int threads) {
  if (threads < 1 || threads > 1024) throw std::invalid_argument("threads: need 1 to 1024");
  std::lock_guard<std::mutex> hold(shared().busy);
  shared().pool->join();
  if (shared().pool->threads() != threads) shared().pool.reset(new fate::Pool(threads));
}

void linear(const fate::MatrixPlace& place, Address record, Address bias, Address x, int tokens,
            Address y) {
  std::lock_guard<std::mutex> hold(shared().busy);
  fate::linear(*shared().pool, shared().memory, place.at(at<const std::uint8_t>(record)),
               at<const float>(bias), at<const float>(x), tokens, at<float>(y));
}

// A step keeps the pool to itself only while it computes; its memory is its own.
class Step {
 public:
  using Experts = std::vector<std::tuple<std::int64_t, Address, bool>>;

  void begin(const fate::ExpertShape& shape, Address x, int tokens, int k, Address ids,
             Address weights) {
    std::lock_guard<std::mutex> hold(shared().busy);
    step_.begin(*shared().pool, shape, at<const float>(x), tokens, k, at<const std::int64_t>(ids),
                at<const float>(weights));
  }
  void run(const Experts& arrived) {
    const std::vector<fate::Arrived> experts = places(arrived);
    std::lock_guard<std::mutex> hold(shared().busy);
    step_.run(*shared().pool, experts);
  }

  // All three at once, where all experts have arrived.
  void whole(const fate::ExpertShape& shape, Address x, int tokens, int k, Address ids,
             Address weights, const Experts& arrived, Address out) {
    begin(shape, x, tokens, k, ids, weights);
    run(arrived);
    finish(out);
  }
  void finish(Address out) {
    std::lock_guard<std::mutex> hold(shared().busy);
    step_.finish(*shared().pool, at<float>(out));
  }

 private:
  static std::vector<fate::Arrived> places(const Experts& arrived) {
    std::vector<fate::Arrived> experts;
    for (const auto& [expert, record, head_only] : arrived)
      experts.push_back({expert, at<const std::uint8_t>(record), head_only});
    return experts;
  }

  fate::ExpertStep step_;
};

}  // namespace

void bind_decode(nb::module_& m);  // bindings_decode.cpp

void bind_io(nb::module_& m);  // bindings_io.cpp

void bind_cache(nb::module_& m);  // bindings_cache.cpp

void bind_run(nb::module_& m);  // bindings_run.cpp

NB_MODULE(_native, m) {
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  bind_io(m);
  bind_cache(m);
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const fate::Kernels* kernels : fate::available()) names.push_back(kernels->name);
    return names;
  });
  m.def("isa", [] { return std::string(fate::active().name); });
  m.def("use_isa", [](const std::string& name) {
    if (!fate::use(name.c_str())) throw std::invalid_argument("no kernels named " + name);
  }, "name"_a);
  m.def("threads", [] { return shared().pool->threads(); });
  m.def("set_threads", &set_threads, "threads"_a, Unlocked());

  nb::enum_<fate::Act>(m, "Act")
      .value("SILU", fate::Act::kSilu)
      .value("GELU", fate::Act::kGelu)
      .value("GELU_TANH", fate::Act::kGeluTanh)
      .value("RELU", fate::Act::kRelu)
      .value("RELU2", fate::Act::kRelu2);

  nb::class_<fate::Gate>(m, "Gate")
      .def("__init__",
           [](fate::Gate* self, fate::Act act, float alpha, float limit, float offset,
              bool limit_after) {
             new (self) fate::Gate{act, alpha, limit, offset, limit_after};
           },
           "act"_a, "alpha"_a, "limit"_a, "offset"_a, "limit_after"_a);

  nb::class_<fate::MatrixPlace>(m, "MatrixPlace")
      .def("__init__",
           [](fate::MatrixPlace* self, int rows, int cols, int group, int bits, std::size_t scale,
              std::size_t zero, std::size_t high, std::size_t low) {
             if (rows < 1 || cols < 1 || (group != 64 && group != 32) || cols % group)
               throw std::invalid_argument("groups of 64 or 32 must divide cols");
             if (bits != 8 && bits != 4) throw std::invalid_argument("bits: need 8 or 4");
             new (self) fate::MatrixPlace{rows, cols, group, bits, scale, zero, high, low};
           },
           "rows"_a, "cols"_a, "group"_a, "bits"_a, "scale"_a, "zero"_a, "high"_a, "low"_a);

  nb::class_<fate::ExpertShape>(m, "ExpertShape")
      .def("__init__",
           [](fate::ExpertShape* self, const fate::MatrixPlace& up, const fate::MatrixPlace& down,
              bool gated, bool interleaved, const fate::Gate& form, std::int64_t up_bias,
              std::int64_t down_bias) {
             if (up.rows != down.cols * (gated ? 2 : 1) || up.cols != down.rows)
               throw std::invalid_argument("the two matrices of an expert do not fit");
             new (self) fate::ExpertShape{up, down, gated, interleaved, form, up_bias, down_bias};
           },
           "up"_a, "down"_a, "gated"_a, "interleaved"_a, "form"_a, "up_bias"_a, "down_bias"_a);

  m.def("linear", &linear, "place"_a, "record"_a, "bias"_a, "x"_a, "tokens"_a, "y"_a, Unlocked());

  nb::class_<Step>(m, "Step")
      .def(nb::init<>())
      .def("begin", &Step::begin, "shape"_a, "x"_a, "tokens"_a, "k"_a, "ids"_a, "weights"_a,
           Unlocked())
      .def("run", &Step::run, "arrived"_a, Unlocked())
      .def("whole", &Step::whole, "shape"_a, "x"_a, "tokens"_a, "k"_a, "ids"_a, "weights"_a,
           "arrived"_a, "out"_a, Unlocked())
      .def("finish", &Step::finish, "out"_a, Unlocked());

  bind_decode(m);
  bind_run(m);
}
