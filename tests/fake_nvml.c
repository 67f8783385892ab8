/* A stand-in for NVIDIA's libnvidia-ml: one RTX 3060 on 8 of 16 lanes, with a compute process, a
   graphics process whose memory is not told, and one that is listed twice. Its structures and
   functions are those of the public nvml.h. With FAKE_NVML_BROKEN set it refuses to start. */
#include <stdlib.h>
#include <string.h>

typedef struct { unsigned version; unsigned long long total, reserved, free, used; } Memory;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu, compute; } Process;

static int device;

int nvmlInit_v2(void) { return getenv("FAKE_NVML_BROKEN") ? 18 : 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) {
    return code == 18 ? "Driver/library version mismatch" : "Not Supported";
}
int nvmlSystemGetDriverVersion(char *text, unsigned size) {
    strncpy(text, "570.133.07", size);
    return 0;
}
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 12080; return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    *handle = &device;
    return index ? 2 : 0;
}
int nvmlDeviceGetName(void *handle, char *text, unsigned size) {
    strncpy(text, "NVIDIA GeForce RTX 3060", size);
    return handle == &device ? 0 : 2;
}
int nvmlDeviceGetMemoryInfo_v2(void *handle, Memory *memory) {
    if (memory->version != (sizeof(Memory) | 2 << 24)) return 25;
    memory->total = 12ull << 30;
    memory->reserved = 1ull << 28;
    memory->free = 10ull << 30;
    memory->used = memory->total - memory->free - memory->reserved;
    return handle == &device ? 0 : 2;
}
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
    *major = 8;
    *minor = 6;
    return handle == &device ? 0 : 2;
}
int nvmlDeviceGetCurrPcieLinkWidth(void *handle, unsigned *width) { *width = 8; return !handle; }
int nvmlDeviceGetMaxPcieLinkWidth(void *handle, unsigned *width) { *width = 16; return !handle; }
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, Process *found) {
    if (*count < 2) { *count = 2; return 7; }
    *count = 2;
    found[0] = (Process){(unsigned)atoi(getenv("FAKE_NVML_PID")), 3ull << 30, 0, 0};
    found[1] = (Process){4194303, 1ull << 30, 0, 0};
    return handle ? 0 : 2;
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(void *handle, unsigned *count, Process *found) {
    if (*count < 2) { *count = 2; return 7; }
    *count = 2;
    found[0] = (Process){4194303, 1ull << 30, 0, 0};
    found[1] = (Process){4194302, ~0ull, 0, 0};
    return handle ? 0 : 2;
}
