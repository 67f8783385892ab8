#define HB_ISA avx512
#define HB_NAME "avx512-vnni"
#include "kernels.inl"

const hb::Kernels& hb::kernels_avx512() { return avx512::TABLE; }
