// What does Python see of reading? See io.h; addresses as in bindings.cpp.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <stdexcept>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "courier.h"
#include "io.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Wanted = std::vector<std::tuple<int, std::uint64_t, std::uintptr_t, std::size_t>>;
using Outcome = std::vector<std::tuple<std::size_t, int>>;

using Files = std::vector<std::tuple<int, int, std::uint64_t, std::int64_t, std::int64_t>>;

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

struct Release {
  void operator()(Py_buffer* view) const {
    PyBuffer_Release(view);
    delete view;
  }
};
using Memory = std::unique_ptr<Py_buffer, Release>;  // kept from moving or going while it is held

Memory memory_of(const nb::object& buffer) {
  auto view = std::make_unique<Py_buffer>();
  if (PyObject_GetBuffer(buffer.ptr(), view.get(), PyBUF_WRITABLE) != 0) throw nb::python_error();
  return Memory(view.release());
}

// Reads of records, asked for by the requests of store/reader.py. Requests and their memory are kept
// until their reads are over. Python's lock guards all but the waiting; what runs Python code may run
// the collector, and that `close`.
class RecordCourier {
 public:
  RecordCourier(const std::string& way, int depth, std::size_t together, const Files& files)
      : courier_(make_reads(way, depth), together) {
    for (const auto& [direct, buffered, first, bytes, records] : files)
      files_.push_back({direct, buffered, first, bytes, records});
  }

  // Begins what can be read; returns the others.
  nb::list start(const nb::sequence& requests) {
    std::vector<std::pair<std::uint64_t, fate::Read>> wanted;
    Opened opened;
    nb::list refused;
    for (const nb::handle request : requests) {
      Open open;
      fate::Read read;
      std::uint64_t id = 0;
      const bool fits = describe(request, id, read, open.memory);
      if (fits && open_.count(id) == 0 && opened.count(id) == 0) {
        open.request = nb::borrow(request);
        opened.emplace(id, std::move(open));
        wanted.push_back({id, read});
      } else {
        refused.append(request);
      }
    }
    if (is_closed_) {
      for (const auto& [id, open] : opened) refused.append(open.request);
      return refused;
    }
    open_.merge(opened);
    if (!wanted.empty()) courier_.start(wanted);
    return refused;
  }

  bool withdraw(std::int64_t layer, std::int64_t expert) {
    const std::uint64_t id = id_of(layer, expert);
    if (open_.count(id) == 0 || !courier_.withdraw(id)) return false;
    const auto gone = open_.extract(id);
    return true;
  }

  // (request, bytes that did not come in, seconds since) of each read that is over.
  nb::list landed() {
    nb::list arrived;
    for (const auto& one : courier_.landed()) {
      const auto node = open_.extract(one.id);
      if (node.empty()) continue;
      const Open& open = node.mapped();
      arrived.append(nb::make_tuple(open.request, one.length - one.done, one.ago_s));
    }
    return arrived;
  }

  bool wait(double most_s) {
    nb::gil_scoped_release unlocked;
    return courier_.wait(most_s);
  }

  void forget() {
    const Opened gone = std::exchange(open_, {});
    nb::gil_scoped_release unlocked;
    courier_.drain();
    courier_.landed();
  }

  void close() {
    is_closed_ = true;
    forget();
  }

  // The file of a layer does not take direct reads.
  void buffer(std::size_t layer) { files_.at(layer).direct = -1; }

 private:
  struct File {
    int direct, buffered;  // descriptors; no direct one: -1
    std::uint64_t first;   // where the first record lies
    std::int64_t bytes, records;
  };
  struct Open {
    nb::object request;
    Memory memory;
  };
  using Opened = std::unordered_map<std::uint64_t, Open>;
  static constexpr std::uint64_t kPage = 4096;

  static std::uint64_t id_of(std::int64_t layer, std::int64_t expert) {
    return static_cast<std::uint64_t>(layer) << 32 | static_cast<std::uint64_t>(expert);
  }

  // False where there is no such record, or the bytes do not fit.
  bool describe(const nb::handle request, std::uint64_t& id, fate::Read& read, Memory& memory) {
    const nb::object key = request[0], buffer = request[1], asked = request[3];
    const auto layer = nb::cast<std::int64_t>(key[0]), expert = nb::cast<std::int64_t>(key[1]);
    if (layer < 0 || layer >= static_cast<std::int64_t>(files_.size())) return false;
    const File& file = files_[layer];
    if (expert < 0 || expert >= file.records) return false;
    const auto start = nb::cast<std::int64_t>(request[2]);
    const auto length = asked.is_none() ? file.bytes - start : nb::cast<std::int64_t>(asked);
    if (start < 0 || length <= 0 || length > file.bytes - start) return false;
    memory = memory_of(buffer);
    if (memory->len < length) return false;
    const auto address = static_cast<std::uint8_t*>(memory->buf);
    const std::uint64_t offset = file.first + expert * file.bytes + start;
    const auto bits = offset | reinterpret_cast<std::uintptr_t>(address) | static_cast<std::uint64_t>(length);
    const bool is_direct = file.direct >= 0 && bits % kPage == 0;
    id = id_of(layer, expert);
    read = {is_direct ? file.direct : file.buffered, offset, address, static_cast<std::size_t>(length)};
    return true;
  }

  std::vector<File> files_;
  Opened open_;
  bool is_closed_ = false;
  fate::Courier courier_;  // goes first: its thread writes to what is open
};

}  // namespace

void bind_io(nb::module_& m) {
  m.def("read_ways", &fate::Reads::ways);
  nb::class_<fate::Reads>(m, "Reads").def("read", &read_batch, "wanted"_a);
  m.def("open_reads", &make_reads, "way"_a, "depth"_a);
  nb::class_<RecordCourier>(m, "RecordCourier")
      .def(nb::init<const std::string&, int, std::size_t, const Files&>(), "way"_a, "depth"_a,
           "together"_a, "files"_a)
      .def("start", &RecordCourier::start, "requests"_a)
      .def("withdraw", &RecordCourier::withdraw, "layer"_a, "expert"_a)
      .def("landed", &RecordCourier::landed)
      .def("wait", &RecordCourier::wait, "most_s"_a)
      .def("forget", &RecordCourier::forget)
      .def("close", &RecordCourier::close)
      .def("buffer", &RecordCourier::buffer, "layer"_a);
}
