#include "courier.h"

#include <algorithm>

namespace fate {

Courier::Courier(std::unique_ptr<Reads> reads, std::size_t together)
    : reads_(std::move(reads)), together_(together), thread_([this] { run(); }) {}

Courier::~Courier() {
  {
    std::lock_guard<std::mutex> hold(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

void Courier::start(const std::vector<std::pair<std::uint64_t, Read>>& wanted) {
  {
    std::lock_guard<std::mutex> hold(mutex_);
    for (const auto& [id, read] : wanted) waiting_.push_back({id, read, {}});
  }
  wake_.notify_one();
}

bool Courier::withdraw(std::uint64_t id) {
  std::lock_guard<std::mutex> hold(mutex_);
  const auto found = std::find_if(waiting_.begin(), waiting_.end(),
                                  [id](const Job& job) { return job.id == id; });
  if (found == waiting_.end()) return false;
  waiting_.erase(found);
  return true;
}

void Courier::drain() {
  std::unique_lock<std::mutex> hold(mutex_);
  waiting_.clear();
  done_.notify_all();  // who waits for one of these waits for nothing
  done_.wait(hold, [this] { return busy_.empty(); });
}

std::vector<Courier::Landed> Courier::landed() {
  std::lock_guard<std::mutex> hold(mutex_);
  const auto now = Clock::now();
  std::vector<Landed> found;
  for (const Job& job : landed_) {
    const std::chrono::duration<double> ago = now - job.ended;
    found.push_back({job.id, job.read.length, job.read.done, job.read.error, ago.count()});
  }
  landed_.clear();
  return found;
}

bool Courier::wait(double most_s) {
  std::unique_lock<std::mutex> hold(mutex_);
  done_.wait_for(hold, std::chrono::duration<double>(most_s),
                 [this] { return !landed_.empty() || (waiting_.empty() && busy_.empty()); });
  return !landed_.empty();
}

void Courier::run() {
  std::unique_lock<std::mutex> hold(mutex_);
  while (true) {
    wake_.wait(hold, [this] { return stop_ || !waiting_.empty(); });
    if (stop_) return;
    take();
    std::vector<Read> batch;
    for (const Job& job : busy_) batch.push_back(job.read);
    hold.unlock();
    reads_->read(batch);
    hold.lock();
    const auto now = Clock::now();
    for (std::size_t i = 0; i < batch.size(); ++i)
      landed_.push_back({busy_[i].id, batch[i], now});
    busy_.clear();
    done_.notify_all();
  }
}

void Courier::take() {
  std::size_t bytes = 0;
  do {
    bytes += waiting_.front().read.length;
    busy_.push_back(waiting_.front());
    waiting_.pop_front();
  } while (!waiting_.empty() && bytes + waiting_.front().read.length <= together_);
}

}  // namespace fate
