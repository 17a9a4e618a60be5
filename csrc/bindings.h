// What do all parts of the bindings share? How addresses become pointers, and how wrong ones are refused.
#pragma once

#include <cstdint>
#include <stdexcept>

namespace fate {

using Address = std::uintptr_t;

template <class T> T* at(Address address) { return reinterpret_cast<T*>(address); }

inline void need(bool fine, const char* what) {
  if (!fine) throw std::invalid_argument(what);
}

}  // namespace fate
