#include "kernels.h"

#include <cstring>

namespace fate {

extern const Kernels kPortable;
#if defined(FATE_X86)
extern const Kernels kAvx2, kAvx512;
#elif defined(FATE_NEON)
extern const Kernels kNeon;
#endif

namespace {

std::vector<const Kernels*> find() {
  std::vector<const Kernels*> found;
#if defined(FATE_X86)
  // Also asks whether the operating system keeps the wide registers.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni"))
    found.push_back(&kAvx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    found.push_back(&kAvx2);
#elif defined(FATE_NEON)
  found.push_back(&kNeon);
#endif
  found.push_back(&kPortable);
  return found;
}

const Kernels* chosen = nullptr;

}  // namespace

const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> all = find();
  return all;
}

const Kernels& active() { return chosen ? *chosen : *available().front(); }

bool use(const char* name) {
  for (const Kernels* kernels : available()) {
    if (std::strcmp(kernels->name, name) == 0) {
      chosen = kernels;
      return true;
    }
  }
  return false;
}

}  // namespace fate
