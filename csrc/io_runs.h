// Which reads can be done in one go, and what is left of one that came in part?
#pragma once

#if defined(__linux__) || defined(__APPLE__)
#define FATE_HAS_PREADV 1

#include <sys/types.h>
#include <sys/uio.h>

#include <cstddef>
#include <deque>
#include <vector>

#include "io.h"

namespace fate {

// Reads that follow each other in one file.
struct Run {
  std::vector<Read*> reads;
  std::vector<iovec> pieces;  // what is still to come of reads[next:]
  std::size_t next = 0;
  int again = 0;  // attempts in a row that the system put off

  bool finished() const { return next == reads.size(); }
  int fd() const { return reads[next]->fd; }
  std::uint64_t offset() const { return reads[next]->offset + reads[next]->done; }
  const iovec* iov() const { return pieces.data() + next; }
  int count() const { return static_cast<int>(pieces.size() - next); }

  // Book what one attempt brought: bytes, 0 at the end of the file, or -errno.
  void advance(ssize_t result);
};

std::vector<Run> runs_of(std::vector<Read>& reads);

// Where an attempt of several reads failed, make a run of each, so that each has its own outcome; false
// where there is nothing to part.
bool part(const Run& run, ssize_t result, std::deque<Run>& singles);

// Read with plain system calls until nothing is left to come.
void finish(Run& run);

}  // namespace fate
#endif
