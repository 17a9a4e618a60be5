// What does Python see of reading? See io.h; addresses as in bindings.cpp.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <tuple>

#include "courier.h"
#include "io.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Wanted = std::vector<std::tuple<int, std::uint64_t, std::uintptr_t, std::size_t>>;
using Outcome = std::vector<std::tuple<std::size_t, int>>;

using Asked = std::vector<std::tuple<std::uint64_t, int, std::uint64_t, std::uintptr_t, std::size_t>>;
using Arrived = std::vector<std::tuple<std::uint64_t, std::size_t, int, double>>;

std::unique_ptr<fate::Reads> make_reads(const std::string& way, int depth) {
  auto reads = fate::Reads::make(way, depth);
  if (!reads) throw std::invalid_argument("no way of reading named " + way + " at that depth");
  return reads;
}

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

void start(fate::Courier& courier, const Asked& asked) {
  std::vector<std::pair<std::uint64_t, fate::Read>> wanted;
  wanted.reserve(asked.size());
  for (const auto& [id, fd, offset, address, length] : asked)
    wanted.push_back({id, {fd, offset, reinterpret_cast<std::uint8_t*>(address), length}});
  courier.start(wanted);
}

Arrived landed(fate::Courier& courier) {
  Arrived arrived;
  for (const auto& one : courier.landed())
    arrived.emplace_back(one.id, one.done, one.error, one.ago_s);
  return arrived;
}

}  // namespace

void bind_io(nb::module_& m) {
  m.def("read_ways", &fate::Reads::ways);
  nb::class_<fate::Reads>(m, "Reads").def("read", &read_batch, "wanted"_a);
  m.def("open_reads", &make_reads, "way"_a, "depth"_a);
  nb::class_<fate::Courier>(m, "Courier")
      .def("start", &start, "asked"_a)
      .def("withdraw", &fate::Courier::withdraw, "id"_a)
      .def("drain", &fate::Courier::drain, nb::call_guard<nb::gil_scoped_release>())
      .def("landed", &landed)
      .def("wait", &fate::Courier::wait, "most_s"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("open_courier", [](const std::string& way, int depth, std::size_t together) {
    return std::make_unique<fate::Courier>(make_reads(way, depth), together);
  }, "way"_a, "depth"_a, "together"_a);
}
