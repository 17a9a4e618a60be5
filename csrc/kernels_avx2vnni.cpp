#include "simd_avx2vnni.h"

#include "kernels.inl"

namespace fate {

extern const Kernels kAvx2Vnni = Core<Avx2Vnni>::table();

}  // namespace fate
