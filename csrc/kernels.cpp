#include "kernels.h"

#include <cstring>

#if defined(FATE_AVX2VNNI)
#include <cpuid.h>
#elif defined(FATE_NEON) && defined(__linux__)
#include <sys/auxv.h>
#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1ul << 20)
#endif
#endif

namespace fate {

extern const Kernels kPortable;
#if defined(FATE_X86)
extern const Kernels kAvx2, kAvx2Vnni, kAvx512;
#elif defined(FATE_NEON)
extern const Kernels kNeon;
#endif

namespace {

#if defined(FATE_AVX2VNNI)
bool has_avxvnni() {  // older compilers' __builtin_cpu_supports does not know its name
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & 1u << 4) != 0;
}
#elif defined(FATE_NEON)
bool has_dot_product() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;  // not before ARMv8.2: a Raspberry Pi 4, say
#elif defined(__APPLE__)
  return true;  // every Mac of this kind
#else
  return false;  // nobody to ask
#endif
}
#endif

std::vector<const Kernels*> find() {
  std::vector<const Kernels*> found;
#if defined(FATE_X86)
  // Also asks whether the operating system keeps the wide registers.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni"))
    found.push_back(&kAvx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
#if defined(FATE_AVX2VNNI)
    if (has_avxvnni()) found.push_back(&kAvx2Vnni);
#endif
    found.push_back(&kAvx2);
  }
#elif defined(FATE_NEON)
  if (has_dot_product()) found.push_back(&kNeon);
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
