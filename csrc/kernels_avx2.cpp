#define HB_ISA avx2
#define HB_NAME "avx2"
#include "kernels.inl"

const hb::Kernels& hb::kernels_avx2() { return avx2::TABLE; }
