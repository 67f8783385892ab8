// Memory that is aligned for the kernels and, when large, asked to be in large pages.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace hb {

// Zeroed bytes; large blocks are touched only when used.
class Bytes {
public:
    Bytes() = default;
    explicit Bytes(size_t size) : size_(size) {
        if (size == 0) return;
        constexpr size_t large = size_t(2) << 20;
        mapped_ = (size + large - 1) / large * large + large;
        base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base_ == MAP_FAILED) {
            base_ = nullptr;
            throw std::bad_alloc();
        }
        const auto address = reinterpret_cast<uintptr_t>(base_);
        data_ = reinterpret_cast<uint8_t*>((address + large - 1) / large * large);
        if (size >= large) madvise(data_, size, MADV_HUGEPAGE);
    }
    Bytes(const Bytes&) = delete;
    Bytes& operator=(const Bytes&) = delete;
    Bytes(Bytes&& other) noexcept { swap(other); }
    Bytes& operator=(Bytes&& other) noexcept {
        swap(other);
        return *this;
    }
    ~Bytes() {
        if (base_ != nullptr) munmap(base_, mapped_);
    }
    uint8_t* data() const { return data_; }
    size_t size() const { return size_; }
    template <typename T> T* as() const { return reinterpret_cast<T*>(data_); }

private:
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
