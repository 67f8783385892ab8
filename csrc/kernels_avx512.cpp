#define HB_ISA avx512
#define HB_NAME "avx512-vnni"
#define HB_BITS 512
#define HB_VNNI 1
#include "kernels.inl"

const hb::Kernels& hb::kernels_avx512() { return avx512::TABLE; }
