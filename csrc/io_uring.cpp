#include "io_uring.h"

#include "io_runs.h"

#if defined(__linux__) && defined(__has_include)
#if __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#include <sys/syscall.h>
#if defined(__NR_io_uring_setup) && defined(IORING_FEAT_SINGLE_MMAP) && defined(IORING_FEAT_NODROP)
#define FATE_URING 1
#endif
#endif
#endif

#ifdef FATE_URING

#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <deque>
#include <mutex>

namespace fate {
namespace {

template <class T> T* place(void* base, std::uint32_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(base) + offset);
}

// One pair of queues shared with the system; used by one thread at a time.
class Ring {
 public:
  explicit Ring(int depth) {
    io_uring_params params{};
    fd_ = static_cast<int>(syscall(__NR_io_uring_setup, depth, &params));
    if (fd_ < 0) return;
    const unsigned need = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP;
    if ((params.features & need) != need) return;
    const std::size_t submissions = params.sq_off.array + params.sq_entries * sizeof(std::uint32_t);
    const std::size_t completions = params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe);
    queues_bytes_ = submissions > completions ? submissions : completions;
    entries_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
    queues_ = map(queues_bytes_, IORING_OFF_SQ_RING);
    entries_ = map(entries_bytes_, IORING_OFF_SQES);
    if (queues_ == nullptr || entries_ == nullptr) return;
    depth_ = params.sq_entries;
    tail_ = place<std::uint32_t>(queues_, params.sq_off.tail);
    mask_ = *place<std::uint32_t>(queues_, params.sq_off.ring_mask);
    array_ = place<std::uint32_t>(queues_, params.sq_off.array);
    done_head_ = place<std::uint32_t>(queues_, params.cq_off.head);
    done_tail_ = place<std::uint32_t>(queues_, params.cq_off.tail);
    done_mask_ = *place<std::uint32_t>(queues_, params.cq_off.ring_mask);
    done_ = place<io_uring_cqe>(queues_, params.cq_off.cqes);
  }

  ~Ring() {
    if (queues_ != nullptr) munmap(queues_, queues_bytes_);
    if (entries_ != nullptr) munmap(entries_, entries_bytes_);
    if (fd_ >= 0) close(fd_);
  }

  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  bool works() const { return depth_ > 0; }

  // Returns when nothing is under way any more, whatever happens: the system writes to the callers'
  // memory until then.
  void read(std::vector<Run>& runs) {
    std::vector<Run*> ready;
    std::deque<Run> singles;  // keeps its elements where they are
    for (std::size_t i = runs.size(); i-- > 0;) ready.push_back(&runs[i]);
    unsigned queued = 0, under_way = 0;
    while (!ready.empty() || queued + under_way > 0) {
      while (!ready.empty() && queued + under_way < depth_) {
        push(*ready.back());
        ready.pop_back();
        ++queued;
      }
      // All at once where all are in the queue: one wake-up instead of one for each.
      const unsigned all = queued + under_way;
      const long taken = syscall(__NR_io_uring_enter, fd_, queued, ready.empty() ? all : 1,
                                 IORING_ENTER_GETEVENTS, nullptr, 0);
      if (taken >= 0) {
        queued -= static_cast<unsigned>(taken);
        under_way += static_cast<unsigned>(taken);
      } else if (errno != EINTR && errno != EAGAIN && errno != EBUSY && under_way == 0) {
        refuse(queued, ready, errno);
        return;
      } else if (errno != EINTR) {
        sched_yield();
      }
      under_way -= reap(ready, singles);
    }
  }

 private:
  void* map(std::size_t bytes, std::uint64_t what) {
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_,
                    static_cast<off_t>(what));
    return at == MAP_FAILED ? nullptr : at;
  }

  void push(Run& run) {
    const std::uint32_t tail = *tail_;
    const std::uint32_t index = tail & mask_;
    io_uring_sqe& entry = static_cast<io_uring_sqe*>(entries_)[index];
    entry = io_uring_sqe{};
    entry.opcode = IORING_OP_READV;
    entry.fd = run.fd();
    entry.off = run.offset();
    entry.addr = reinterpret_cast<std::uintptr_t>(run.iov());
    entry.len = static_cast<std::uint32_t>(run.count());
    entry.user_data = reinterpret_cast<std::uintptr_t>(&run);
    array_[index] = index;
    __atomic_store_n(tail_, tail + 1, __ATOMIC_RELEASE);
  }

  unsigned reap(std::vector<Run*>& ready, std::deque<Run>& singles) {
    unsigned count = 0;
    std::uint32_t head = *done_head_;
    const std::uint32_t tail = __atomic_load_n(done_tail_, __ATOMIC_ACQUIRE);
    for (; head != tail; ++head, ++count) {
      const io_uring_cqe& entry = done_[head & done_mask_];
      Run* run = reinterpret_cast<Run*>(static_cast<std::uintptr_t>(entry.user_data));
      const std::size_t before = singles.size();
      if (!part(*run, entry.res, singles)) {
        run->advance(entry.res);
        if (!run->finished()) ready.push_back(run);
      }
      for (std::size_t i = before; i < singles.size(); ++i) ready.push_back(&singles[i]);
    }
    __atomic_store_n(done_head_, head, __ATOMIC_RELEASE);
    return count;
  }

  // Take back what the system does not want to see; nothing of it has been started.
  void refuse(unsigned queued, std::vector<Run*>& ready, int error) {
    const std::uint32_t tail = *tail_;
    for (unsigned i = 1; i <= queued; ++i) {
      const io_uring_sqe& entry = static_cast<io_uring_sqe*>(entries_)[(tail - i) & mask_];
      ready.push_back(reinterpret_cast<Run*>(static_cast<std::uintptr_t>(entry.user_data)));
    }
    __atomic_store_n(tail_, tail - queued, __ATOMIC_RELEASE);
    for (Run* run : ready) run->advance(-error);
  }

  int fd_ = -1;
  unsigned depth_ = 0;
  void* queues_ = nullptr;
  void* entries_ = nullptr;
  std::size_t queues_bytes_ = 0, entries_bytes_ = 0;
  std::uint32_t* tail_ = nullptr;
  std::uint32_t* array_ = nullptr;
  std::uint32_t* done_head_ = nullptr;
  std::uint32_t* done_tail_ = nullptr;
  std::uint32_t mask_ = 0, done_mask_ = 0;
  io_uring_cqe* done_ = nullptr;
};

// A ring for every caller at once; they are kept.
class UringReads : public Reads {
 public:
  explicit UringReads(std::unique_ptr<Ring> first, int depth) : depth_(depth) {
    idle_.push_back(std::move(first));
  }

  void read(std::vector<Read>& reads) override {
    std::vector<Run> runs = runs_of(reads);
    std::unique_ptr<Ring> ring = take();
    if (ring) {
      ring->read(runs);
      std::lock_guard<std::mutex> hold(mutex_);
      idle_.push_back(std::move(ring));
    } else {
      for (Run& run : runs) finish(run);
    }
  }

 private:
  std::unique_ptr<Ring> take() {
    {
      std::lock_guard<std::mutex> hold(mutex_);
      if (!idle_.empty()) {
        std::unique_ptr<Ring> ring = std::move(idle_.back());
        idle_.pop_back();
        return ring;
      }
    }
    auto ring = std::make_unique<Ring>(depth_);
    return ring->works() ? std::move(ring) : nullptr;  // out of descriptors or locked memory
  }

  const int depth_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Ring>> idle_;
};

}  // namespace

std::unique_ptr<Reads> make_uring(int depth) {
  auto ring = std::make_unique<Ring>(depth);
  if (!ring->works()) return nullptr;
  return std::make_unique<UringReads>(std::move(ring), depth);
}

}  // namespace fate

#else

namespace fate {
std::unique_ptr<Reads> make_uring(int) { return nullptr; }
}  // namespace fate

#endif
