// How do many reads get from files into memory at once, each with its own outcome?
//
// Two ways with one contract: io_uring (one system call for all of them), where the system has it
// and allows it, and threads that read side by side. Neighbours in a file are read in one go even
// where they lie apart in memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace fate {

struct Read {
  int fd;
  std::uint64_t offset;
  std::uint8_t* address;
  std::size_t length;
  std::size_t done = 0;  // bytes that came in; less than `length` at the end of the file or on error
  int error = 0;         // errno
};

// Blocks until every read is complete or has failed; any number of threads may call at once. No
// memory is written to after `read` has returned.
class Reads {
 public:
  virtual ~Reads() = default;
  virtual void read(std::vector<Read>& reads) = 0;

  // The ways this system allows, best first: "io_uring", "threads"; empty where it has no preadv.
  static std::vector<std::string> ways();
  // `depth`: reads under way at once, in [1, 256]. Null when the way is not to be had.
  static std::unique_ptr<Reads> make(const std::string& way, int depth);
};

}  // namespace fate
