// Reads that go on while whoever asked for them does something else, each with its own outcome.
//
// One thread takes them in the order they came, a few at a time: one that nobody wants any more can be
// withdrawn until it begins, and a read from elsewhere has to wait for few.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "io.h"

namespace fate {

class Courier {
 public:
  struct Landed {
    std::uint64_t id;
    std::size_t length, done;  // as of `Read`
    int error;
    double ago_s;  // since its batch was through
  };

  // `together`: most bytes under way at once; a single read may be larger.
  Courier(std::unique_ptr<Reads> reads, std::size_t together);
  // Forgets what has not begun and waits for what has.
  ~Courier();

  void start(const std::vector<std::pair<std::uint64_t, Read>>& wanted);
  // True: the read does not begin any more, and is never reported.
  bool withdraw(std::uint64_t id);
  // Forgets what has not begun and waits for what has: no memory is written to afterwards.
  void drain();
  // What came in, or failed, since the last call.
  std::vector<Landed> landed();
  // Blocks until `landed` has something to say; false after `most_s`, or where nothing was asked for.
  bool wait(double most_s);

 private:
  using Clock = std::chrono::steady_clock;
  struct Job {
    std::uint64_t id;
    Read read;
    Clock::time_point ended;
  };

  void run();
  void take();

  const std::unique_ptr<Reads> reads_;
  const std::size_t together_;
  std::mutex mutex_;  // guards what follows, but `busy_` belongs to the thread while it reads
  std::condition_variable wake_, done_;
  std::deque<Job> waiting_;
  std::vector<Job> busy_, landed_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace fate
