#include "simd_portable.h"

#include "decode.inl"

namespace fate {

extern const DecodeKernels kDecodePortable = Decode<Portable>::table();

}  // namespace fate
