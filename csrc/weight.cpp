#include "weight.h"

#include <emmintrin.h>

#include <algorithm>
#include <vector>

namespace hb {

namespace {

constexpr size_t Q4_0_BYTES = 18, Q8_0_BYTES = 34, Q4_K_BYTES = 144, Q6_K_BYTES = 210;

int element_bytes(Scheme scheme) { return scheme == Scheme::F32 ? 4 : 2; }

constexpr int STRIP = 256;  // columns that are moved for all lanes before the next
constexpr int QUAD = 4;     // lanes of block schemes that are moved together

// Four neighbouring lanes: their stored rows, and the first lane.
struct Quad {
    uint8_t* rows[QUAD];
    int lane;
};

// Four vectors of four words: 16 bytes of each row of a quad, or four words of all its lanes.
struct Square {
    __m128i line[4];
};

Square transposed(const Square& s) {
    const __m128i a = _mm_unpacklo_epi32(s.line[0], s.line[1]);
    const __m128i b = _mm_unpacklo_epi32(s.line[2], s.line[3]);
    const __m128i c = _mm_unpackhi_epi32(s.line[0], s.line[1]);
    const __m128i d = _mm_unpackhi_epi32(s.line[2], s.line[3]);
    return {_mm_unpacklo_epi64(a, b), _mm_unpackhi_epi64(a, b), _mm_unpacklo_epi64(c, d),
            _mm_unpackhi_epi64(c, d)};
}

__m128i load(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

void store(uint8_t* p, __m128i v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v); }

// Words of the stored rows at a byte offset, lanes side by side; and back.
Square from_rows(const Quad& quad, size_t at) {
    Square rows;
    for (int i = 0; i < QUAD; ++i) rows.line[i] = load(quad.rows[i] + at);
    return transposed(rows);
}

void to_rows(const Quad& quad, size_t at, const Square& words) {
    const Square rows = transposed(words);
    for (int i = 0; i < QUAD; ++i) store(quad.rows[i] + at, rows.line[i]);
}

// Words of a quad's lanes in a run of 64-byte vectors, one word of every lane in each; and back.
Square from_vectors(const uint8_t* vectors, const Quad& quad) {
    Square words;
    for (int j = 0; j < 4; ++j) words.line[j] = load(vectors + 64 * j + 4 * quad.lane);
    return words;
}

void to_vectors(uint8_t* vectors, const Quad& quad, const Square& words) {
    for (int j = 0; j < 4; ++j) store(vectors + 64 * j + 4 * quad.lane, words.line[j]);
}

// Moves 16 bytes of every row; the bits of `turned` change in every byte.
template <bool packing>
void move_words(uint8_t* vectors, const Quad& quad, size_t at, int turned = 0) {
    const __m128i mask = _mm_set1_epi8(char(turned));
    Square words = packing ? from_rows(quad, at) : from_vectors(vectors, quad);
    for (__m128i& line : words.line) line = _mm_xor_si128(line, mask);
    packing ? to_vectors(vectors, quad, words) : to_rows(quad, at, words);
}

// Moves `size` bytes of every row to or from a plane that has them lane by lane.
template <bool packing, size_t size> void move_each(uint8_t* plane, const Quad& quad, size_t at) {
    for (int i = 0; i < QUAD; ++i) {
        uint8_t *packed = plane + size * size_t(quad.lane + i), *stored = quad.rows[i] + at;
        packing ? std::memcpy(packed, stored, size) : std::memcpy(stored, packed, size);
    }
}

// Each function below moves the columns [start, stop).
template <bool packing, size_t size>
void plain(uint8_t* group, uint8_t* row, int lane, int start, int stop) {
    for (int k = start; k < stop; ++k) {
        uint8_t *packed = group + size * (size_t(k) * GROUP + lane), *stored = row + size * k;
        packing ? std::memcpy(packed, stored, size) : std::memcpy(stored, packed, size);
    }
}

template <bool packing>
void q4_0(const Weight& w, uint8_t* group, const Quad& quad, int start, int stop) {
    uint8_t* scales = group + size_t(w.cols / BLOCK) * 256;
    for (int b = start / BLOCK; b < stop / BLOCK; ++b) {
        move_each<packing, 2>(scales + size_t(b) * GROUP * 2, quad, b * Q4_0_BYTES);
        move_words<packing>(group + size_t(b) * 256, quad, b * Q4_0_BYTES + 2);
    }
}

// The sign bit of every byte is turned: s8 becomes u8 + 128, and back.
template <bool packing>
void q8_0(const Weight& w, uint8_t* group, const Quad& quad, int start, int stop) {
    uint8_t* scales = group + size_t(w.cols / BLOCK) * 512;
    for (int b = start / BLOCK; b < stop / BLOCK; ++b) {
        move_each<packing, 2>(scales + size_t(b) * GROUP * 2, quad, b * Q8_0_BYTES);
        for (int half = 0; half < 2; ++half)
            move_words<packing>(group + size_t(b) * 512 + 256 * half, quad,
                                b * Q8_0_BYTES + 2 + 16 * half, 0x80);
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

// Moves the scales and minima of one superblock of one lane.
template <bool packing> void move_scales(uint8_t* scales, uint8_t* minima, uint8_t* stored) {
    uint8_t scale[8], least[8];
    if (packing) open_scales(stored, scale, least);
    for (int i = 0; i < 8; ++i) {
        uint8_t &s = scales[i * GROUP], &m = minima[i * GROUP];
        packing ? s = scale[i] : scale[i] = s;
        packing ? m = least[i] : least[i] = m;
    }
    if (!packing) close_scales(stored, scale, least);
}

template <bool packing>
void q4_k(const Weight& w, uint8_t* group, const Quad& quad, int start, int stop) {
    const int blocks = w.cols / BLOCK;
    uint8_t* scales = group + size_t(blocks) * 256;
    uint8_t* minima = scales + size_t(blocks) * GROUP;
    uint8_t* d = minima + size_t(blocks) * GROUP;
    uint8_t* dmin = d + size_t(w.cols / SUPER) * GROUP * 2;
    for (int super = start / SUPER; super < stop / SUPER; ++super) {
        const size_t at = super * Q4_K_BYTES, first = size_t(super) * 8 * GROUP + quad.lane;
        move_each<packing, 2>(d + size_t(super) * GROUP * 2, quad, at);
        move_each<packing, 2>(dmin + size_t(super) * GROUP * 2, quad, at + 2);
        for (int i = 0; i < QUAD; ++i)
            move_scales<packing>(scales + first + i, minima + first + i, quad.rows[i] + at + 4);
        for (int half = 0; half < 8; ++half)
            move_words<packing>(group + (size_t(super) * 8 + half) * 256, quad,
                                at + 16 + 16 * half);
    }
}

// GGUF's order of a superblock: two halves of 128 weights; in each, ql byte l holds weights l (low)
// and l + 64 (high) for l < 64, and qh byte l holds two bits of weights l, l + 32, l + 64, l + 96.
// A quarter of a half is a block of 32: the low four bits of its weights l and l + 16 share a byte,
// and the high two bits of its weights l, l + 4, l + 8 and l + 12 (for either half of the block).
struct HalfOfQ6K {
    Square low[4], high[2];
};

__m128i bits(__m128i words, int shift, int mask) {
    return _mm_and_si128(_mm_srli_epi32(words, shift), _mm_set1_epi8(char(mask)));
}

__m128i joined(__m128i a, __m128i b, int shift) {
    return _mm_or_si128(a, _mm_slli_epi32(b, shift));
}

// The block's `low` words (four vectors) and `high` ones (two), from and to the stored order.
void pack_quarter(const HalfOfQ6K& half, int quarter, Square& low, __m128i* high) {
    const Square *first = half.low + 2 * (quarter % 2), *second = first + 1;
    const int shift = quarter / 2 * 4;
    for (int j = 0; j < 4; ++j)
        low.line[j] = joined(bits(first->line[j], shift, 15), bits(second->line[j], shift, 15), 4);
    for (int h = 0; h < 2; ++h) {
        high[h] = _mm_setzero_si128();
        for (int f = 0; f < 4; ++f)
            high[h] = joined(high[h], bits(half.high[h].line[f], 2 * quarter, 3), 2 * f);
    }
}

void unpack_quarter(HalfOfQ6K& half, int quarter, const Square& low, const __m128i* high) {
    Square *first = half.low + 2 * (quarter % 2), *second = first + 1;
    const int shift = quarter / 2 * 4;
    for (int j = 0; j < 4; ++j) {
        first->line[j] = joined(first->line[j], bits(low.line[j], 0, 15), shift);
        second->line[j] = joined(second->line[j], bits(low.line[j], 4, 15), shift);
    }
    for (int h = 0; h < 2; ++h)
        for (int f = 0; f < 4; ++f)
            half.high[h].line[f] =
                joined(half.high[h].line[f], bits(high[h], 2 * f, 3), 2 * quarter);
}

template <bool packing> void half_of_q6_k(uint8_t* group, uint8_t* plane, const Quad& quad,
                                          size_t ql, size_t qh) {
    HalfOfQ6K half{};
    if (packing) {
        for (int i = 0; i < 4; ++i) half.low[i] = from_rows(quad, ql + 16 * i);
        for (int h = 0; h < 2; ++h) half.high[h] = from_rows(quad, qh + 16 * h);
    }
    for (int quarter = 0; quarter < 4; ++quarter) {
        uint8_t *vectors = group + 256 * quarter, *crumbs = plane + 128 * quarter + 4 * quad.lane;
        Square low;
        __m128i high[2];
        if (packing) {
            pack_quarter(half, quarter, low, high);
            to_vectors(vectors, quad, low);
            for (int h = 0; h < 2; ++h) store(crumbs + 64 * h, high[h]);
        } else {
            for (int h = 0; h < 2; ++h) high[h] = load(crumbs + 64 * h);
            unpack_quarter(half, quarter, from_vectors(vectors, quad), high);
        }
    }
    if (packing) return;
    for (int i = 0; i < 4; ++i) to_rows(quad, ql + 16 * i, half.low[i]);
    for (int h = 0; h < 2; ++h) to_rows(quad, qh + 16 * h, half.high[h]);
}

template <bool packing>
void q6_k(const Weight& w, uint8_t* group, const Quad& quad, int start, int stop) {
    const int blocks = w.cols / BLOCK;
    uint8_t* plane = group + size_t(blocks) * 256;
    uint8_t* scales = plane + size_t(blocks) * 128;
    uint8_t* d = scales + size_t(blocks) * 2 * GROUP;
    for (int super = start / SUPER; super < stop / SUPER; ++super) {
        const size_t at = super * Q6_K_BYTES;
        for (int part = 0; part < 2; ++part) {
            const size_t block = size_t(super) * 8 + 4 * part;
            half_of_q6_k<packing>(group + block * 256, plane + block * 128, quad, at + 64 * part,
                                  at + 128 + 32 * part);
        }
        for (int i = 0; i < 16; ++i)
            move_each<packing, 1>(scales + (size_t(super) * 16 + i) * GROUP, quad, at + 192 + i);
        move_each<packing, 2>(d + size_t(super) * GROUP * 2, quad, at + 208);
    }
}

template <bool packing>
void move_quad(const Weight& w, uint8_t* group, const Quad& quad, int start, int stop) {
    switch (w.scheme) {
        case Scheme::Q4_0: return q4_0<packing>(w, group, quad, start, stop);
        case Scheme::Q8_0: return q8_0<packing>(w, group, quad, start, stop);
        case Scheme::Q4_K: return q4_k<packing>(w, group, quad, start, stop);
        case Scheme::Q6_K: return q6_k<packing>(w, group, quad, start, stop);
        default:
            for (int i = 0; i < QUAD; ++i)
                element_bytes(w.scheme) == 4
                    ? plain<packing, 4>(group, quad.rows[i], quad.lane + i, start, stop)
                    : plain<packing, 2>(group, quad.rows[i], quad.lane + i, start, stop);
    }
}

// The last group may have fewer rows; `blank` [row_bytes] stands for those that are not there.
template <bool packing> void over_lanes(const Weight& w, uint8_t* stored, int g, uint8_t* blank) {
    const size_t bytes = row_bytes(w.scheme, w.cols);
    uint8_t* group = w.data + w.group_bytes * size_t(g);
    for (int start = 0; start < w.cols; start += STRIP) {
        const int stop = std::min(start + STRIP, w.cols);
        for (int lane = 0; lane < GROUP; lane += QUAD) {
            Quad quad{{}, lane};
            for (int i = 0; i < QUAD; ++i) {
                const int row = g * GROUP + lane + i;
                quad.rows[i] = row < w.rows ? stored + bytes * size_t(row) : blank;
            }
            move_quad<packing>(w, group, quad, start, stop);
        }
    }
}

template <bool packing> void over_lanes(const Weight& w, uint8_t* stored, int g) {
    std::vector<uint8_t> blank((g + 1) * GROUP > w.rows ? row_bytes(w.scheme, w.cols) : 0);
    over_lanes<packing>(w, stored, g, blank.data());
}

// The largest magnitude's bits; `T` is signed, since of those the compiler has vector instructions.
template <typename T> T largest_bits(const uint8_t* plane, size_t count, T without_sign) {
    T largest = 0;
    for (size_t i = 0; i < count; ++i) {
        T bits;
        std::memcpy(&bits, plane + i * sizeof(T), sizeof(T));
        largest = std::max(largest, T(bits & without_sign));
    }
    return largest;
}

constexpr int16_t INFINITE_F16 = 0x7c00, INFINITE_BF16 = 0x7f80;

bool are_finite(const uint8_t* plane, size_t count, int16_t infinite) {
    return largest_bits<int16_t>(plane, count, 0x7fff) < infinite;
}

}  // namespace

int block_of(Scheme scheme) {
    switch (scheme) {
        case Scheme::Q4_0:
        case Scheme::Q8_0: return BLOCK;
        case Scheme::Q4_K:
        case Scheme::Q6_K: return SUPER;
        default: return 1;
    }
}

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

bool is_finite(const Weight& w, int g) {
    const uint8_t* group = w.group(g);
    const size_t all = size_t(w.cols) * GROUP, scales = all / BLOCK, supers = all / SUPER;
    switch (w.scheme) {
        case Scheme::F32: return largest_bits<int32_t>(group, all, 0x7fffffff) < 0x7f800000;
        case Scheme::F16: return are_finite(group, all, INFINITE_F16);
        case Scheme::BF16: return are_finite(group, all, INFINITE_BF16);
        case Scheme::Q8_0: return are_finite(group + all, scales, INFINITE_F16);
        case Scheme::Q4_0: return are_finite(group + all / 2, scales, INFINITE_F16);
        case Scheme::Q4_K: return are_finite(group + all / 2 + 2 * scales, 2 * supers, INFINITE_F16);
        default: return are_finite(group + all * 3 / 4 + 2 * scales, supers, INFINITE_F16);
    }
}

void unpack_group(const Weight& w, uint8_t* stored, int g) {
    over_lanes<false>(w, stored, g);
}

}  // namespace hb
