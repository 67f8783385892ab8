// Memory that is aligned for the kernels and, when large, in large pages: at once, or later.
//
// Large pages read a sixth faster. But memory that nobody has used lately is slow to get in large
// pieces (in a virtual machine tenfold), so what is filled once and then only read, the weights,
// starts in small pages and is collapsed into large ones while the model already runs.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace hb {

constexpr size_t LARGE_PAGE = size_t(2) << 20;

// The kernel's numbers, which older C libraries do not name.
constexpr int POPULATE_WRITE = 23, COLLAPSE = 25;

// Does this kernel know an advice? It looks at the advice before the range, which is empty.
inline bool knows_advice(int advice) { return madvise(nullptr, 0, advice) == 0; }

// Moves whole large pages of [data, data + size) into large pages, until `ending`. What cannot be
// moved, or is no longer mapped, stays as it is.
template <typename Ending> void collapse(uint8_t* data, size_t size, Ending ending) {
    for (size_t at = 0; at + LARGE_PAGE <= size && !ending(); at += LARGE_PAGE)
        madvise(data + at, LARGE_PAGE, COLLAPSE);
}

enum class Pages { LARGE, LARGE_LATER };

// Zeroed bytes; large blocks are touched only when used.
class Bytes {
public:
    Bytes() = default;
    explicit Bytes(size_t size, Pages pages = Pages::LARGE) : size_(size) {
        if (size == 0) return;
        constexpr size_t large = LARGE_PAGE;
        mapped_ = (size + large - 1) / large * large + large;
        base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base_ == MAP_FAILED) {
            base_ = nullptr;
            throw std::bad_alloc();
        }
        const auto address = reinterpret_cast<uintptr_t>(base_);
        data_ = reinterpret_cast<uint8_t*>((address + large - 1) / large * large);
        const bool now = pages == Pages::LARGE || !knows_advice(COLLAPSE);
        if (size >= large && now) madvise(data_, size, MADV_HUGEPAGE);
        forbid_rest(true);
    }
    Bytes(const Bytes&) = delete;
    Bytes& operator=(const Bytes&) = delete;
    Bytes(Bytes&& other) noexcept { swap(other); }
    Bytes& operator=(Bytes&& other) noexcept {
        swap(other);
        return *this;
    }
    ~Bytes() {
        if (base_ == nullptr) return;
        forbid_rest(false);
        munmap(base_, mapped_);
    }
    // Gets the pages of [first, last) that lie wholly in it: one call costs less than their faults.
    void populate(size_t first, size_t last) const {
        constexpr size_t page = 4096;
        first = (first + page - 1) / page * page;
        last = std::min(last, size_) / page * page;
        if (first < last) madvise(data_ + first, last - first, POPULATE_WRITE);
    }
    uint8_t* data() const { return data_; }
    size_t size() const { return size_; }
    template <typename T> T* as() const { return reinterpret_cast<T*>(data_); }

private:
    // The sanitizer knows what malloc gives; of a mapping it must be told where the bytes end.
    void forbid_rest([[maybe_unused]] bool forbidden) const {
#if defined(__SANITIZE_ADDRESS__)
        auto* start = static_cast<uint8_t*>(base_);
        const auto mark = forbidden ? __asan_poison_memory_region : __asan_unpoison_memory_region;
        mark(start, size_t(data_ - start));
        mark(data_ + size_, mapped_ - size_t(data_ - start) - size_);
#endif
    }
    void swap(Bytes& other) {
        std::swap(base_, other.base_);
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        std::swap(mapped_, other.mapped_);
    }
    void* base_ = nullptr;
    uint8_t* data_ = nullptr;
    size_t size_ = 0, mapped_ = 0;
};

}  // namespace hb
