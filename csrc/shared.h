// Which threads and which memory do all calls of this process share?
//
// One pool for the process. It is never destroyed: after a fork its threads exist no longer, and at
// exit they may still sleep.
#pragma once

#include <memory>
#include <mutex>

#include "attention.h"

namespace fate {

struct Shared {
  std::mutex busy;  // held while the pool, or the memory, is in use
  std::unique_ptr<Pool> pool{new Pool(1)};
  Buffer memory;
  DecodeMemory decode;
};

inline Shared& shared() {
  static Shared* const one = new Shared;
  return *one;
}

// What a call that computes takes hold of.
struct Locked {
  std::lock_guard<std::mutex> hold{shared().busy};
  Pool& pool = *shared().pool;
  DecodeMemory& memory = shared().decode;
};

}  // namespace fate
