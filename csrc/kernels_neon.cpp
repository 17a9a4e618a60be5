#include "simd_neon.h"

#include "kernels.inl"

namespace fate {

extern const Kernels kNeon = Core<Neon>::table();

}  // namespace fate
