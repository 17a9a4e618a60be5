// What does Python see of reading? See io.h; addresses as in bindings.cpp.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <tuple>

#include "io.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Wanted = std::vector<std::tuple<int, std::uint64_t, std::uintptr_t, std::size_t>>;
using Outcome = std::vector<std::tuple<std::size_t, int>>;

Outcome read_batch(fate::Reads& reads, const Wanted& wanted) {
  std::vector<fate::Read> batch;
  batch.reserve(wanted.size());
  for (const auto& [fd, offset, address, length] : wanted)
    batch.push_back({fd, offset, reinterpret_cast<std::uint8_t*>(address), length});
  {
    nb::gil_scoped_release unlocked;
    reads.read(batch);
  }
  Outcome outcome;
  outcome.reserve(batch.size());
  for (const fate::Read& one : batch) outcome.emplace_back(one.done, one.error);
  return outcome;
}

}  // namespace

void bind_io(nb::module_& m) {
  m.def("read_ways", &fate::Reads::ways);
  nb::class_<fate::Reads>(m, "Reads").def("read", &read_batch, "wanted"_a);
  m.def("open_reads", [](const std::string& way, int depth) {
    auto reads = fate::Reads::make(way, depth);
    if (!reads) throw std::invalid_argument("no way of reading named " + way + " at that depth");
    return reads;
  }, "way"_a, "depth"_a);
}
