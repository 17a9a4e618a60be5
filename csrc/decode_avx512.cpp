#include "simd_avx512.h"

#include "decode.inl"

namespace fate {

extern const DecodeKernels kDecodeAvx512 = Decode<Avx512>::table();

}  // namespace fate
