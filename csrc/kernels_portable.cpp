#include "simd_portable.h"

#include "kernels.inl"

namespace fate {

extern const Kernels kPortable = Core<Portable>::table();

}  // namespace fate
