// How do several cores share one piece of work without waiting long for each other?
//
// Pieces are claimed as cores get to them, alone or in spans that shorten towards the end, so a core
// that the system took away delays at most what it holds, and a sleeping one nothing. Between calls a
// worker looks out for a moment, lets others run for another, then sleeps.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace fate {

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Call work(piece, thread) for every piece in [0, pieces); returns when all are done. `thread` is
  // in [0, threads()) and not shared while a piece runs. One caller at a time.
  template <class Work> void run(int pieces, const Work& work) {
    run_pieces(pieces, false, [](const void* self, int piece, int, int thread) {
      (*static_cast<const Work*>(self))(piece, thread);
    }, &work);
  }

  // Call work(first, last, thread) for spans of neighbouring pieces that together are [0, pieces):
  // long ones first, for memory is read fastest on and on, and short ones last, so that all end
  // together.
  template <class Work> void run_spans(int pieces, const Work& work) {
    run_pieces(pieces, true, [](const void* self, int first, int last, int thread) {
      (*static_cast<const Work*>(self))(first, last, thread);
    }, &work);
  }

  // As run_spans, but the caller does something else until `join`; meanwhile the other cores begin.
  // `work` must stay until then. Whatever else is run first ends what was posted.
  template <class Work> void post_spans(int pieces, const Work& work) {
    post(pieces, true, [](const void* self, int first, int last, int thread) {
      (*static_cast<const Work*>(self))(first, last, thread);
    }, &work);
  }
  void join();

  // Memory of one thread for the length of a piece, 64-byte aligned, at least `bytes`.
  std::uint8_t* scratch(int thread, std::size_t bytes);

 private:
  using Call = void (*)(const void* work, int first, int last, int thread);

  void run_pieces(int pieces, bool in_spans, Call call, const void* work);
  void post(int pieces, bool in_spans, Call call, const void* work);
  void claim(int thread);
  void serve(int thread);
  bool wait_for_job(std::uint64_t last);

  // One job at a time: `job_` is its number while workers may join it, else 0.
  std::atomic<std::uint64_t> job_{0};
  std::atomic<int> inside_{0};
  std::atomic<int> next_{0};
  std::atomic<int> asleep_{0};
  std::atomic<bool> stop_{false};
  std::uint64_t jobs_ = 0;
  int pieces_ = 0;
  bool in_spans_ = false;
  bool is_posted_ = false;
  Call call_ = nullptr;
  const void* work_ = nullptr;

  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
  std::vector<std::unique_ptr<std::uint8_t[]>> scratch_;
  std::vector<std::size_t> scratch_bytes_;
};

}  // namespace fate
