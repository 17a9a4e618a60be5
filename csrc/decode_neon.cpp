#include "simd_neon.h"

#include "decode.inl"

namespace fate {

extern const DecodeKernels kDecodeNeon = Decode<Neon>::table();

}  // namespace fate
