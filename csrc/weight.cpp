#include "weight.h"

#include <algorithm>

namespace hb {

namespace {

constexpr size_t Q4_0_BYTES = 18, Q8_0_BYTES = 34, Q4_K_BYTES = 144, Q6_K_BYTES = 210;

int element_bytes(Scheme scheme) { return scheme == Scheme::F32 ? 4 : 2; }

constexpr int STRIP = 256;  // columns that are moved for all lanes before the next

// Moves `count` bytes to the packed side, or back to the stored side.
template <bool packing, size_t count> void move(uint8_t* packed, uint8_t* stored) {
    packing ? std::memcpy(packed, stored, count) : std::memcpy(stored, packed, count);
}

uint32_t get(const uint8_t* p) {
    uint32_t four;
    std::memcpy(&four, p, 4);
    return four;
}

void put(uint8_t* p, uint32_t four) { std::memcpy(p, &four, 4); }

// Where weight word j (4 bytes) of a lane lies in a run of 64-byte vectors.
uint8_t* word(uint8_t* plane, int j, int lane) { return plane + 64 * j + 4 * lane; }

// Each function moves the columns [start, stop) of one lane.
template <bool packing, size_t size>
void plain(uint8_t* group, uint8_t* row, int lane, int start, int stop) {
    for (int k = start; k < stop; ++k)
        move<packing, size>(group + size * (size_t(k) * GROUP + lane), row + size * k);
}

template <bool packing>
void q4_0(const Weight& w, uint8_t* group, uint8_t* row, int lane, int start, int stop) {
    const int blocks = w.cols / BLOCK;
    uint8_t* scales = group + size_t(blocks) * 256;
    for (int b = start / BLOCK; b < stop / BLOCK; ++b) {
        uint8_t* block = row + b * Q4_0_BYTES;
        move<packing, 2>(scales + 2 * (size_t(b) * GROUP + lane), block);
        for (int j = 0; j < 4; ++j)
            move<packing, 4>(word(group + size_t(b) * 256, j, lane), block + 2 + 4 * j);
    }
}

// The sign bit of every byte is turned: s8 becomes u8 + 128, and back.
template <bool packing>
void q8_0(const Weight& w, uint8_t* group, uint8_t* row, int lane, int start, int stop) {
    const int blocks = w.cols / BLOCK;
    uint8_t* scales = group + size_t(blocks) * 512;
    for (int b = start / BLOCK; b < stop / BLOCK; ++b) {
        uint8_t* block = row + b * Q8_0_BYTES;
        move<packing, 2>(scales + 2 * (size_t(b) * GROUP + lane), block);
        for (int j = 0; j < 8; ++j) {
            uint8_t* packed = word(group + size_t(b) * 512, j, lane);
            uint8_t* stored = block + 2 + 4 * j;
            if (packing)
                put(packed, get(stored) ^ 0x80808080u);
            else
                put(stored, get(packed) ^ 0x80808080u);
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

template <bool packing>
void q4_k(const Weight& w, uint8_t* group, uint8_t* row, int lane, int start, int stop) {
    const int blocks = w.cols / BLOCK;
    uint8_t* scales = group + size_t(blocks) * 256;
    uint8_t* minima = scales + size_t(blocks) * GROUP;
    uint8_t* d = minima + size_t(blocks) * GROUP;
    uint8_t* dmin = d + size_t(w.cols / SUPER) * GROUP * 2;
    for (int super = start / SUPER; super < stop / SUPER; ++super) {
        uint8_t* block = row + super * Q4_K_BYTES;
        move<packing, 2>(d + 2 * (size_t(super) * GROUP + lane), block);
        move<packing, 2>(dmin + 2 * (size_t(super) * GROUP + lane), block + 2);
        uint8_t scale[8], least[8];
        if (packing) open_scales(block + 4, scale, least);
        for (int i = 0; i < 8; ++i) {
            move<packing, 1>(scales + (size_t(super) * 8 + i) * GROUP + lane, scale + i);
            move<packing, 1>(minima + (size_t(super) * 8 + i) * GROUP + lane, least + i);
        }
        if (!packing) close_scales(block + 4, scale, least);
        for (int pair = 0; pair < 4; ++pair)
            for (int j = 0; j < 8; ++j)
                move<packing, 4>(word(group + (size_t(super) * 4 + pair) * 512, j, lane),
                     block + 16 + 32 * pair + 4 * j);
    }
}

// GGUF's order of a superblock: two halves of 128 weights; in each, ql byte l holds weights l (low)
// and l + 64 (high) for l < 64, and qh byte l holds two bits of weights l, l + 32, l + 64, l + 96.
// Four weights move at a time: shifted within a word, then masked byte by byte.
template <bool packing>
void q6_k(const Weight& w, uint8_t* group, uint8_t* row, int lane, int start, int stop) {
    constexpr uint32_t NIBBLES = 0x0f0f0f0f, CRUMBS = 0x03030303;
    const int blocks = w.cols / BLOCK;
    uint8_t* high = group + size_t(blocks) * 256;
    uint8_t* scales = high + size_t(blocks) * 128;
    uint8_t* d = scales + size_t(blocks) * 2 * GROUP;
    for (int super = start / SUPER; super < stop / SUPER; ++super) {
        uint8_t* stored = row + super * Q6_K_BYTES;
        move<packing, 2>(d + 2 * (size_t(super) * GROUP + lane), stored + 208);
        for (int i = 0; i < 16; ++i)
            move<packing, 1>(scales + (size_t(super) * 16 + i) * GROUP + lane, stored + 192 + i);
        if (!packing) std::memset(stored, 0, 192);
        for (int block = 0; block < 8; ++block) {
            const int part = block / 4, quarter = block % 4, shift = quarter / 2 * 4;
            uint8_t* ql = stored + 64 * part + 32 * (quarter % 2);
            uint8_t* qh = stored + 128 + 32 * part;
            const size_t b = size_t(super) * 8 + block;
            for (int j = 0; j < 4; ++j) {
                uint8_t *packed = word(group + b * 256, j, lane), *first = ql + 4 * j;
                if (packing) {
                    put(packed, (get(first) >> shift & NIBBLES) |
                                    (get(first + 16) >> shift & NIBBLES) << 4);
                } else {
                    put(first, get(first) | (get(packed) & NIBBLES) << shift);
                    put(first + 16, get(first + 16) | (get(packed) >> 4 & NIBBLES) << shift);
                }
            }
            for (int h = 0; h < 2; ++h) {
                uint8_t* packed = word(high + b * 128, h, lane);
                uint32_t crumbs = 0;
                for (int f = 0; f < 4; ++f) {
                    uint8_t* four = qh + 16 * h + 4 * f;
                    crumbs |= (get(four) >> (2 * quarter) & CRUMBS) << (2 * f);
                    if (!packing)
                        put(four, get(four) | (get(packed) >> (2 * f) & CRUMBS) << (2 * quarter));
                }
                if (packing) put(packed, crumbs);
            }
        }
    }
}

template <bool packing> void over_lanes(const Weight& w, uint8_t* stored, int g) {
    const size_t bytes = row_bytes(w.scheme, w.cols);
    uint8_t* group = w.data + w.group_bytes * size_t(g);
    const int lanes = std::min(GROUP, w.rows - g * GROUP);
    for (int start = 0; start < w.cols; start += STRIP) {
        const int stop = std::min(start + STRIP, w.cols);
        for (int lane = 0; lane < lanes; ++lane) {
            uint8_t* row = stored + bytes * (size_t(g) * GROUP + lane);
            switch (w.scheme) {
                case Scheme::Q4_0: q4_0<packing>(w, group, row, lane, start, stop); break;
                case Scheme::Q8_0: q8_0<packing>(w, group, row, lane, start, stop); break;
                case Scheme::Q4_K: q4_k<packing>(w, group, row, lane, start, stop); break;
                case Scheme::Q6_K: q6_k<packing>(w, group, row, lane, start, stop); break;
                case Scheme::F32: plain<packing, 4>(group, row, lane, start, stop); break;
                default: plain<packing, 2>(group, row, lane, start, stop);
            }
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
    over_lanes<true>(w, const_cast<uint8_t*>(stored), g);
}

void unpack_group(const Weight& w, uint8_t* stored, int g) {
    over_lanes<false>(w, stored, g);
}

}  // namespace hb
