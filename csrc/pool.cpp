#include "pool.h"

#include <algorithm>
#include <chrono>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace fate {
namespace {

constexpr int kLooks = 2000;   // about 30 microseconds
constexpr auto kYields = std::chrono::microseconds(1000);

void breathe() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

Pool::Pool(int threads) : scratch_(threads), scratch_bytes_(threads, 0) {
  for (int thread = 1; thread < threads; ++thread)
    workers_.emplace_back([this, thread] { serve(thread); });
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> hold(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

std::uint8_t* Pool::scratch(int thread, std::size_t bytes) {
  if (scratch_bytes_[thread] < bytes) {
    scratch_[thread].reset(new std::uint8_t[bytes + 64]);
    scratch_bytes_[thread] = bytes;
  }
  const auto address = reinterpret_cast<std::uintptr_t>(scratch_[thread].get());
  return scratch_[thread].get() + (64 - address % 64) % 64;
}

void Pool::run_pieces(int pieces, bool in_spans, Call call, const void* work) {
  if (pieces <= 1 || workers_.empty()) {
    join();
    const int size = in_spans ? pieces : 1;
    for (int piece = 0; piece < pieces; piece += size) call(work, piece, piece + size, 0);
    return;
  }
  post(pieces, in_spans, call, work);
  join();
}

void Pool::post(int pieces, bool in_spans, Call call, const void* work) {
  join();
  call_ = call;
  work_ = work;
  pieces_ = pieces;
  in_spans_ = in_spans;
  next_ = 0;
  is_posted_ = true;
  job_ = ++jobs_;
  if (asleep_ > 0) {
    { std::lock_guard<std::mutex> hold(mutex_); }
    wake_.notify_all();
  }
}

void Pool::join() {
  if (!is_posted_) return;
  claim(0);
  job_ = 0;  // whoever has not joined yet stays out
  while (inside_ > 0) breathe();
  is_posted_ = false;
}

void Pool::claim(int thread) {
  int first = next_;
  while (first < pieces_) {
    const int size = in_spans_ ? std::max(1, (pieces_ - first) / (2 * threads())) : 1;
    if (!next_.compare_exchange_weak(first, first + size)) continue;
    call_(work_, first, first + size, thread);
    first = next_;
  }
}

void Pool::serve(int thread) {
  std::uint64_t last = 0;
  while (wait_for_job(last)) {
    ++inside_;
    const std::uint64_t job = job_;  // after ++inside_: either the caller sees us, or we see 0
    if (job != 0 && job != last) {
      claim(thread);
      last = job;
    }
    --inside_;
  }
}

bool Pool::wait_for_job(std::uint64_t last) {
  const auto is_new = [&] {
    const std::uint64_t job = job_;
    return job != 0 && job != last;
  };
  for (int look = 0; look < kLooks; ++look) {
    if (is_new()) return true;
    breathe();
  }
  const auto end = std::chrono::steady_clock::now() + kYields;
  while (std::chrono::steady_clock::now() < end) {
    if (is_new()) return true;
    if (stop_) return false;
    std::this_thread::yield();
  }
  std::unique_lock<std::mutex> hold(mutex_);
  ++asleep_;
  wake_.wait(hold, [&] { return stop_ || is_new(); });
  --asleep_;
  return !stop_;
}

}  // namespace fate
