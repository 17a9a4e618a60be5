#include "simd_avx512.h"

#include "kernels.inl"

namespace fate {

extern const Kernels kAvx512 = Core<Avx512>::table();

}  // namespace fate
