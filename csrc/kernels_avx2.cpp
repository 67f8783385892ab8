#define HB_ISA avx2
#define HB_NAME "avx2"
#define HB_BITS 256
#define HB_VNNI 0
#include "kernels.inl"

const hb::Kernels& hb::kernels_avx2() { return avx2::TABLE; }
