#include "simd_avx2.h"

#include "kernels.inl"

namespace fate {

extern const Kernels kAvx2 = Core<Avx2>::table();

}  // namespace fate
