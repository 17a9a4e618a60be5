#include "io_runs.h"

#ifdef FATE_HAS_PREADV

#include <algorithm>
#include <cerrno>

namespace fate {
namespace {

constexpr std::size_t kRunBytes = 1 << 20;   // larger ones gain nothing from being joined
constexpr std::size_t kRunReads = 64;
constexpr std::size_t kAttempt = 1 << 30;    // a system call stops short of 2 GiB
constexpr int kMostAgain = 10000;

bool is_passing(ssize_t result) { return result == -EINTR || result == -EAGAIN; }

iovec rest_of(const Read& read) {
  return {read.address + read.done, std::min(read.length - read.done, kAttempt)};
}

Run run_of(Read* read) {
  Run run;
  run.reads.push_back(read);
  run.pieces.push_back(rest_of(*read));
  return run;
}

}  // namespace

void Run::advance(ssize_t result) {
  if (result <= 0) {
    if (is_passing(result) && ++again < kMostAgain) return;
    for (; next < reads.size(); ++next) reads[next]->error = static_cast<int>(-result);
    return;
  }
  again = 0;
  auto bytes = static_cast<std::size_t>(result);
  while (bytes > 0 && next < reads.size()) {
    Read& read = *reads[next];
    const std::size_t part = std::min(bytes, read.length - read.done);
    read.done += part;
    bytes -= part;
    if (read.done < read.length) {
      pieces[next] = rest_of(read);
      return;
    }
    ++next;
  }
}

std::vector<Run> runs_of(std::vector<Read>& reads) {
  std::vector<Read*> sorted;
  for (Read& read : reads)
    if (read.length > 0) sorted.push_back(&read);
  std::stable_sort(sorted.begin(), sorted.end(), [](const Read* a, const Read* b) {
    return a->fd != b->fd ? a->fd < b->fd : a->offset < b->offset;
  });
  std::vector<Run> runs;
  std::size_t bytes = 0;
  for (Read* read : sorted) {
    if (!runs.empty()) {
      const Read& last = *runs.back().reads.back();
      if (last.fd == read->fd && last.offset + last.length == read->offset &&
          bytes + read->length <= kRunBytes && runs.back().reads.size() < kRunReads) {
        runs.back().reads.push_back(read);
        runs.back().pieces.push_back(rest_of(*read));
        bytes += read->length;
        continue;
      }
    }
    runs.push_back(run_of(read));
    bytes = read->length;
  }
  return runs;
}

bool part(const Run& run, ssize_t result, std::deque<Run>& singles) {
  if (result >= 0 || is_passing(result) || run.count() < 2) return false;
  for (std::size_t i = run.next; i < run.reads.size(); ++i) singles.push_back(run_of(run.reads[i]));
  return true;
}

void finish(Run& run) {
  std::deque<Run> singles;
  while (!run.finished()) {
    const ssize_t count = preadv(run.fd(), run.iov(), run.count(), static_cast<off_t>(run.offset()));
    const ssize_t result = count < 0 ? -errno : count;
    if (part(run, result, singles)) break;
    run.advance(result);
  }
  for (Run& single : singles) finish(single);
}

}  // namespace fate
#endif
