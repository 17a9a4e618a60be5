#include "io.h"

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#include "io_runs.h"
#include "io_uring.h"

namespace fate {

#ifdef FATE_HAS_PREADV
namespace {

// The caller reads too; helpers join it. They are started with the first batch that wants them.
class ThreadReads : public Reads {
 public:
  explicit ThreadReads(int depth) : helpers_(std::min(depth, kMostHelpers + 1) - 1) {}

  ~ThreadReads() override {
    {
      std::lock_guard<std::mutex> hold(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void read(std::vector<Read>& reads) override {
    Batch batch{runs_of(reads)};
    std::unique_lock<std::mutex> hold(mutex_);
    if (batch.runs.size() > 1) {
      if (threads_.empty())
        for (int i = 0; i < helpers_; ++i) threads_.emplace_back([this] { help(); });
      waiting_.push_back(&batch);
      wake_.notify_all();
    }
    while (batch.next < batch.runs.size()) read_one(batch, hold);
    done_.wait(hold, [&] { return batch.busy == 0; });
    waiting_.erase(std::remove(waiting_.begin(), waiting_.end(), &batch), waiting_.end());
  }

 private:
  static constexpr int kMostHelpers = 15;

  struct Batch {
    std::vector<Run> runs;
    std::size_t next = 0;  // the first run that nobody has taken
    int busy = 0;          // runs being read
  };

  void read_one(Batch& batch, std::unique_lock<std::mutex>& hold) {
    Run& run = batch.runs[batch.next++];
    ++batch.busy;
    hold.unlock();
    finish(run);
    hold.lock();
    if (--batch.busy == 0) done_.notify_all();
  }

  void help() {
    std::unique_lock<std::mutex> hold(mutex_);
    while (true) {
      wake_.wait(hold, [&] { return stop_ || open_batch() != nullptr; });
      if (stop_) return;
      read_one(*open_batch(), hold);
    }
  }

  Batch* open_batch() {
    for (Batch* batch : waiting_)
      if (batch->next < batch->runs.size()) return batch;
    return nullptr;
  }

  const int helpers_;
  std::mutex mutex_;  // guards what follows, and every Batch
  std::condition_variable wake_, done_;
  std::deque<Batch*> waiting_;
  std::vector<std::thread> threads_;
  bool stop_ = false;
};

}  // namespace

std::vector<std::string> Reads::ways() {
  std::vector<std::string> found;
  if (make_uring(1)) found.push_back("io_uring");
  found.push_back("threads");
  return found;
}

std::unique_ptr<Reads> Reads::make(const std::string& way, int depth) {
  if (depth < 1 || depth > 256) return nullptr;
  if (way == "io_uring") return make_uring(depth);
  if (way == "threads") return std::make_unique<ThreadReads>(depth);
  return nullptr;
}

#else

std::vector<std::string> Reads::ways() { return {}; }
std::unique_ptr<Reads> Reads::make(const std::string&, int) { return nullptr; }

#endif

}  // namespace fate
