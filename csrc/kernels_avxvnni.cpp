#define HB_ISA avxvnni
#define HB_NAME "avx-vnni"
#define HB_BITS 256
#define HB_VNNI 1
#include "kernels.inl"

const hb::Kernels& hb::kernels_avxvnni() { return avxvnni::TABLE; }
