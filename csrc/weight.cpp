#include "weight.h"

#include <algorithm>

namespace hb {

namespace {

constexpr size_t Q4_0_BYTES = 18, Q8_0_BYTES = 34, Q4_K_BYTES = 144, Q6_K_BYTES = 210;

int element_bytes(Scheme scheme) { return scheme == Scheme::F32 ? 4 : 2; }

// Copies `count` bytes one way or the other: to the packed side, or back to the stored side.
struct Copy {
    bool packing;
    void operator()(uint8_t* packed, uint8_t* stored, size_t count) const {
        packing ? std::memcpy(packed, stored, count) : std::memcpy(stored, packed, count);
    }
};

// Where weight word j (4 bytes) of a lane lies in a run of 64-byte vectors.
uint8_t* word(uint8_t* plane, int j, int lane) { return plane + 64 * j + 4 * lane; }

void plain(const Weight& w, uint8_t* group, uint8_t* row, int lane, Copy copy) {
    const size_t size = element_bytes(w.scheme);
    for (int k = 0; k < w.cols; ++k)
        copy(group + size * (size_t(k) * GROUP + lane), row + size * k, size);
}

void q4_0(const Weight& w, uint8_t* group, uint8_t* row, int lane, Copy copy) {
    const int blocks = w.cols / BLOCK;
    uint8_t* scales = group + size_t(blocks) * 256;
    for (int b = 0; b < blocks; ++b) {
        uint8_t* block = row + b * Q4_0_BYTES;
        copy(scales + 2 * (size_t(b) * GROUP + lane), block, 2);
        for (int j = 0; j < 4; ++j)
            copy(word(group + size_t(b) * 256, j, lane), block + 2 + 4 * j, 4);
    }
}

// The sign bit of every byte is turned: s8 becomes u8 + 128, and back.
void q8_0(const Weight& w, uint8_t* group, uint8_t* row, int lane, Copy copy) {
    const int blocks = w.cols / BLOCK;
    uint8_t* scales = group + size_t(blocks) * 512;
    for (int b = 0; b < blocks; ++b) {
        uint8_t* block = row + b * Q8_0_BYTES;
        copy(scales + 2 * (size_t(b) * GROUP + lane), block, 2);
        for (int i = 0; i < BLOCK; ++i) {
            uint8_t* packed = word(group + size_t(b) * 512, i / 4, lane) + i % 4;
            uint8_t* stored = block + 2 + i;
            copy.packing ? * packed = *stored ^ 0x80 : * stored = *packed ^ 0x80;
        }
    }
}

// The 6-bit scales and minima of a Q4_K superblock, and the 12 bytes that hold them.
void open_scales(const uint8_t* s, uint8_t* scale, uint8_t* least) {
    for (int i = 0; i < 4; ++i) {
        scale[i] = s[i] & 63;
        least[i] = s[i + 4] & 63;
        scale[i + 4] = (s[i + 8] & 15) | (s[i] >> 6) << 4;
        least[i + 4] = s[i + 8] >> 4 | (s[i + 4] >> 6) << 4;
    }
}

void close_scales(uint8_t* s, const uint8_t* scale, const uint8_t* least) {
    for (int i = 0; i < 4; ++i) {
        s[i] = scale[i] | (scale[i + 4] >> 4) << 6;
        s[i + 4] = least[i] | (least[i + 4] >> 4) << 6;
        s[i + 8] = (scale[i + 4] & 15) | (least[i + 4] & 15) << 4;
    }
}

void q4_k(const Weight& w, uint8_t* group, uint8_t* row, int lane, Copy copy) {
    const int blocks = w.cols / BLOCK;
    uint8_t* scales = group + size_t(blocks) * 256;
    uint8_t* minima = scales + size_t(blocks) * GROUP;
    uint8_t* d = minima + size_t(blocks) * GROUP;
    uint8_t* dmin = d + size_t(w.cols / SUPER) * GROUP * 2;
    for (int super = 0; super < w.cols / SUPER; ++super) {
        uint8_t* block = row + super * Q4_K_BYTES;
        copy(d + 2 * (size_t(super) * GROUP + lane), block, 2);
        copy(dmin + 2 * (size_t(super) * GROUP + lane), block + 2, 2);
        uint8_t scale[8], least[8];
        if (copy.packing) open_scales(block + 4, scale, least);
        for (int i = 0; i < 8; ++i) {
            copy(scales + (size_t(super) * 8 + i) * GROUP + lane, scale + i, 1);
            copy(minima + (size_t(super) * 8 + i) * GROUP + lane, least + i, 1);
        }
        if (!copy.packing) close_scales(block + 4, scale, least);
        for (int pair = 0; pair < 4; ++pair)
            for (int j = 0; j < 8; ++j)
                copy(word(group + (size_t(super) * 4 + pair) * 512, j, lane),
                     block + 16 + 32 * pair + 4 * j, 4);
    }
}

// GGUF's order of a superblock: two halves of 128 weights; in each, ql byte l holds weights l (low)
// and l + 64 (high) for l < 64, and qh byte l holds two bits of weights l, l + 32, l + 64, l + 96.
void q6_k(const Weight& w, uint8_t* group, uint8_t* row, int lane, Copy copy) {
    const int blocks = w.cols / BLOCK;
    uint8_t* high = group + size_t(blocks) * 256;
    uint8_t* scales = high + size_t(blocks) * 128;
    uint8_t* d = scales + size_t(blocks) * 2 * GROUP;
    for (int super = 0; super < w.cols / SUPER; ++super) {
        uint8_t* block = row + super * Q6_K_BYTES;
        uint8_t* sc = block + 192;
        copy(d + 2 * (size_t(super) * GROUP + lane), block + 208, 2);
        for (int i = 0; i < 16; ++i)
            copy(scales + (size_t(super) * 16 + i) * GROUP + lane, sc + i, 1);
        if (!copy.packing) std::memset(block, 0, 192);
        for (int k = 0; k < SUPER; ++k) {
            const int part = k / 128, l = k % 128;
            uint8_t& low_byte = block[64 * part + l % 64];
            uint8_t& high_byte = block[128 + 32 * part + l % 32];
            const int low_shift = l < 64 ? 0 : 4, high_shift = 2 * (l / 32);
            const int b = super * 8 + k / BLOCK, i = k % BLOCK;
            uint8_t& packed_low = word(group + size_t(b) * 256, i / 4 % 4, lane)[i % 4];
            uint8_t& packed_high = word(high + size_t(b) * 128, i / 16, lane)[i % 4];
            const int to_low = i < 16 ? 0 : 4, to_high = 2 * (i / 4 % 4);
            if (copy.packing) {
                packed_low |= (low_byte >> low_shift & 15) << to_low;
                packed_high |= (high_byte >> high_shift & 3) << to_high;
            } else {
                low_byte |= (packed_low >> to_low & 15) << low_shift;
                high_byte |= (packed_high >> to_high & 3) << high_shift;
            }
        }
    }
}

void over_lanes(const Weight& w, uint8_t* stored, int g, Copy copy) {
    const size_t bytes = row_bytes(w.scheme, w.cols);
    uint8_t* group = w.data + w.group_bytes * size_t(g);
    const int lanes = std::min(GROUP, w.rows - g * GROUP);
    for (int lane = 0; lane < lanes; ++lane) {
        uint8_t* row = stored + bytes * (size_t(g) * GROUP + lane);
        switch (w.scheme) {
            case Scheme::Q4_0: q4_0(w, group, row, lane, copy); break;
            case Scheme::Q8_0: q8_0(w, group, row, lane, copy); break;
            case Scheme::Q4_K: q4_k(w, group, row, lane, copy); break;
            case Scheme::Q6_K: q6_k(w, group, row, lane, copy); break;
            default: plain(w, group, row, lane, copy);
        }
    }
}

}  // namespace

size_t row_bytes(Scheme scheme, int cols) {
    switch (scheme) {
        case Scheme::Q4_0: return size_t(cols) / BLOCK * Q4_0_BYTES;
        case Scheme::Q8_0: return size_t(cols) / BLOCK * Q8_0_BYTES;
        case Scheme::Q4_K: return size_t(cols) / SUPER * Q4_K_BYTES;
        case Scheme::Q6_K: return size_t(cols) / SUPER * Q6_K_BYTES;
        default: return size_t(cols) * element_bytes(scheme);
    }
}

size_t group_bytes(Scheme scheme, int cols) {
    const size_t blocks = cols / BLOCK, supers = cols / SUPER;
    const auto planes = [&]() -> size_t {
        switch (scheme) {
            case Scheme::Q4_0: return blocks * (256 + 2 * GROUP);
            case Scheme::Q8_0: return blocks * (512 + 2 * GROUP);
            case Scheme::Q4_K: return blocks * (256 + 2 * GROUP) + supers * 4 * GROUP;
            case Scheme::Q6_K: return blocks * (256 + 128 + 2 * GROUP) + supers * 2 * GROUP;
            default: return size_t(cols) * GROUP * element_bytes(scheme);
        }
    };
    return (planes() + 63) / 64 * 64;
}

void pack_group(const Weight& w, const uint8_t* stored, int g) {
    over_lanes(w, const_cast<uint8_t*>(stored), g, Copy{true});
}

void unpack_group(const Weight& w, uint8_t* stored, int g) {
    over_lanes(w, stored, g, Copy{false});
}

}  // namespace hb
