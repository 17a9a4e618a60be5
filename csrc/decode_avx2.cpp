#include "simd_avx2.h"

#include "decode.inl"

namespace fate {

extern const DecodeKernels kDecodeAvx2 = Decode<Avx2>::table();

}  // namespace fate
