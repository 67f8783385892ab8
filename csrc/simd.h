// Sixteen lanes, written once: in one register of 512 bits (HB_BITS), or in two of 256.
//
// A kernel file is compiled once per instruction set, in a namespace of its own (HB_ISA); which one
// runs is decided when the module is loaded. HB_VNNI is 1 where one instruction adds four products of
// bytes. Lanes never mix except in the horizontal helpers, which have one fixed order.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace HB_ISA {

// Magnitudes are compared by their bits, so that NaN is larger than any number.
inline float float_of(int32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

#if HB_BITS == 512

struct F16 {  // 16 x f32
    __m512 v;
};
struct I16 {  // 16 x i32
    __m512i v;
};
struct B64 {  // 64 bytes: 16 lanes of 4
    __m512i v;
};
using Mask = __mmask16;

inline F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F16 x) { _mm512_storeu_ps(p, x.v); }
inline F16 splat(float x) { return {_mm512_set1_ps(x)}; }
inline F16 zero() { return {_mm512_setzero_ps()}; }
inline F16 add(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F16 sub(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F16 mul(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F16 div(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
// a * b + c, rounded once
inline F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F16 round(F16 a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline F16 to_float(I16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I16 to_int(F16 a) { return {_mm512_cvtps_epi32(a.v)}; }
inline F16 load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline F16 load_bf16(const uint16_t* p) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}
inline F16 load_u8(const uint8_t* p) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(raw))};
}
inline F16 load_i8(const int8_t* p) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw))};
}
inline void store_i8(int8_t* p, I16 a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
// 2^n for whole n in [-126, 127], through the exponent bits
inline F16 exp2i(F16 n) {
    const __m512i bits = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 23))};
}
inline Mask less_equal(I16 a, I16 b) { return _mm512_cmple_epi32_mask(a.v, b.v); }
inline Mask both(Mask a, Mask b) { return a & b; }
inline F16 choose(Mask m, F16 yes, F16 no) { return {_mm512_mask_blend_ps(m, no.v, yes.v)}; }

inline I16 splat_i(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I16 add(I16 a, I16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
template <int N> inline I16 shift_left(I16 a) { return {_mm512_slli_epi32(a.v, N)}; }
inline I16 iota() {
    return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
}

inline B64 load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline B64 low_nibbles(B64 a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(0x0f))}; }
inline B64 high_nibbles(B64 a) {
    return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(0x0f))};
}
// bits 2f, 2f+1 of every byte, moved to bits 4, 5
template <int f> inline B64 crumbs_high(B64 a) {
    const __m512i moved =
        f < 2 ? _mm512_slli_epi16(a.v, 4 - 2 * f) : _mm512_srli_epi16(a.v, 2 * f - 4);
    return {_mm512_and_si512(moved, _mm512_set1_epi8(0x30))};
}
inline B64 either(B64 a, B64 b) { return {_mm512_or_si512(a.v, b.v)}; }
inline I16 words(B64 a) { return {a.v}; }
// Per lane the sum of four products u8 x s8 is added; `x` is the same four for all lanes.
inline I16 dot(I16 acc, B64 w, const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return {_mm512_dpbusd_epi32(acc.v, w.v, _mm512_set1_epi32(four))};
}

inline float sum(F16 a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(F16 a) { return _mm512_reduce_max_ps(a.v); }
inline float largest_magnitude(F16 a, F16 b) {
    const __m512i rest = _mm512_set1_epi32(0x7fffffff);
    const __m512i p = _mm512_and_si512(_mm512_castps_si512(a.v), rest);
    const __m512i q = _mm512_and_si512(_mm512_castps_si512(b.v), rest);
    return float_of(_mm512_reduce_max_epi32(_mm512_max_epi32(p, q)));
}
// y[i] = the sum of x[i], for eight vectors at once; in one order for all of them
inline void sum_eight(const F16* x, float* y) {
    const auto pairs = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    };
    const auto fours = [](__m512 a, __m512 b) {
        const __m512d p = _mm512_castps_pd(a), q = _mm512_castps_pd(b);
        return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
    };
    const auto quarters = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    const __m512 low = fours(pairs(x[0].v, x[1].v), pairs(x[2].v, x[3].v));
    const __m512 high = fours(pairs(x[4].v, x[5].v), pairs(x[6].v, x[7].v));
    const __m512 both = quarters(low, high);
    _mm256_storeu_ps(y, _mm512_castps512_ps256(quarters(both, both)));
}
inline int32_t sum(I16 a) { return _mm512_reduce_add_epi32(a.v); }

#else

struct F16 {
    __m256 a, b;
};
struct I16 {
    __m256i a, b;
};
struct B64 {
    __m256i a, b;
};
struct Mask {
    __m256 a, b;
};

inline F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F16 x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
inline F16 splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F16 add(F16 x, F16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F16 sub(F16 x, F16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F16 mul(F16 x, F16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F16 div(F16 x, F16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F16 max(F16 x, F16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F16 min(F16 x, F16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F16 fma(F16 x, F16 y, F16 z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline F16 round(F16 x) {
    constexpr int how = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, how), _mm256_round_ps(x.b, how)};
}
inline F16 to_float(I16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I16 to_int(F16 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline __m128i half(const void* p, int i) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p) + i);
}
inline F16 load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(half(p, 0)), _mm256_cvtph_ps(half(p, 1))};
}
inline F16 load_bf16(const uint16_t* p) {
    const auto widen = [](__m128i raw) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
    };
    return {widen(half(p, 0)), widen(half(p, 1))};
}
inline F16 load_u8(const uint8_t* p) {
    const __m128i raw = half(p, 0);
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(raw)),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(raw, 8)))};
}
inline F16 load_i8(const int8_t* p) {
    const __m128i raw = half(p, 0);
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(raw)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(raw, 8)))};
}
inline void store_i8(int8_t* p, I16 x) {
    const __m256i words = _mm256_packs_epi32(x.a, x.b), bytes = _mm256_packs_epi16(words, words);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5);
    const __m256i sorted = _mm256_permutevar8x32_epi32(bytes, order);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(sorted));
}
inline F16 exp2i(F16 n) {
    const auto one = [](__m256 x) {
        const __m256i bits = _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(127));
        return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
    };
    return {one(n.a), one(n.b)};
}
inline Mask less_equal(I16 x, I16 y) {
    const auto one = [](__m256i p, __m256i q) {
        return _mm256_castsi256_ps(
            _mm256_xor_si256(_mm256_cmpgt_epi32(p, q), _mm256_set1_epi32(-1)));
    };
    return {one(x.a, y.a), one(x.b, y.b)};
}
inline Mask both(Mask x, Mask y) { return {_mm256_and_ps(x.a, y.a), _mm256_and_ps(x.b, y.b)}; }
inline F16 choose(Mask m, F16 yes, F16 no) {
    return {_mm256_blendv_ps(no.a, yes.a, m.a), _mm256_blendv_ps(no.b, yes.b, m.b)};
}

inline I16 splat_i(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I16 add(I16 x, I16 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
template <int N> inline I16 shift_left(I16 x) {
    return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)};
}
inline I16 iota() {
    return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
            _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
}

inline B64 load_bytes(const uint8_t* p) {
    const auto* q = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline B64 low_nibbles(B64 x) {
    const __m256i m = _mm256_set1_epi8(0x0f);
    return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
inline B64 high_nibbles(B64 x) {
    return low_nibbles({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)});
}
template <int f> inline B64 crumbs_high(B64 x) {
    const __m256i m = _mm256_set1_epi8(0x30);
    const auto one = [&](__m256i p) {
        const __m256i moved =
            f < 2 ? _mm256_slli_epi16(p, 4 - 2 * f) : _mm256_srli_epi16(p, 2 * f - 4);
        return _mm256_and_si256(moved, m);
    };
    return {one(x.a), one(x.b)};
}
inline B64 either(B64 x, B64 y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
inline I16 words(B64 x) { return {x.a, x.b}; }

#if HB_VNNI

inline I16 dot(I16 acc, B64 w, const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    const __m256i s = _mm256_set1_epi32(four);
    return {_mm256_dpbusd_epi32(acc.a, w.a, s), _mm256_dpbusd_epi32(acc.b, w.b, s)};
}

#endif

inline float sum(F16 x) {
    const __m256 eight = _mm256_add_ps(x.a, x.b);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float largest(F16 x) {
    const __m256 eight = _mm256_max_ps(x.a, x.b);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
// The two halves of eight lanes, joined again and again until one is left.
template <typename Join> inline int32_t folded(__m256i eight, Join join) {
    const __m128i four = join(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    const __m128i two = join(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(join(two, _mm_shuffle_epi32(two, 0xb1)));
}
inline float largest_magnitude(F16 x, F16 y) {
    const auto bits = [](__m256 p) {
        return _mm256_and_si256(_mm256_castps_si256(p), _mm256_set1_epi32(0x7fffffff));
    };
    const __m256i p = _mm256_max_epi32(bits(x.a), bits(x.b));
    const __m256i q = _mm256_max_epi32(bits(y.a), bits(y.b));
    return float_of(folded(_mm256_max_epi32(p, q), [](__m128i a, __m128i b) {
        return _mm_max_epi32(a, b);
    }));
}
inline void sum_eight(const F16* x, float* y) {
    const auto pairs = [](F16 a, F16 b) {
        const __m256 p = _mm256_add_ps(a.a, a.b), q = _mm256_add_ps(b.a, b.b);
        return _mm256_hadd_ps(p, q);
    };
    const __m256 low = _mm256_hadd_ps(pairs(x[0], x[1]), pairs(x[2], x[3]));
    const __m256 high = _mm256_hadd_ps(pairs(x[4], x[5]), pairs(x[6], x[7]));
    _mm256_storeu_ps(y, _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                                      _mm256_permute2f128_ps(low, high, 0x31)));
}
inline int32_t sum(I16 x) {
    return folded(_mm256_add_epi32(x.a, x.b), [](__m128i a, __m128i b) {
        return _mm_add_epi32(a, b);
    });
}

#endif

// Rows of activations whose sums are made side by side: one where the registers hold a whole block of
// weights, else as many as they hold sums of, so that a weight is loaded once for all of them.
constexpr int ROWS_ABREAST = HB_BITS == 512 ? 1 : 4;
constexpr int QUERIES_ABREAST = HB_BITS == 512 ? 8 : 4;

// `dots` takes w(0) .. w(N - 1) and, of R rows `stride` bytes apart, the 4 N activations at x. To
// sums[r] it adds per lane the sum of w * x, of weights of at most MOST. Where MOST is 255, sums[r] must be
// -128 times the sum of the activations, and becomes that of (w - 128) * x.
#if HB_VNNI

// One row is summed in two chains, so that the next instruction need not wait for the one before.
template <int MOST, int N, int R, typename Weights>
inline void dots(I16* sums, Weights w, const int8_t* x, size_t stride) {
    if constexpr (R == 1) {
        I16 other = splat_i(0);
        for (int j = 0; j < N / 2; ++j) {
            sums[0] = dot(sums[0], w(j), x + 4 * j);
            other = dot(other, w(N / 2 + j), x + 2 * N + 4 * j);
        }
        sums[0] = add(sums[0], other);
    } else {
        for (int j = 0; j < N; ++j) {
            const B64& four = w(j);
            for (int r = 0; r < R; ++r)
                sums[r] = dot(sums[r], four, x + size_t(r) * stride + 4 * j);
        }
    }
}

#else

inline __m256i four_of(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
}

// GCC would load the activations of all rows first, and then lack registers for the sums.
inline void pin(__m256i& a, __m256i& b) { asm volatile("" : "+x"(a), "+x"(b)); }

// Two products are added in 16 bits, and then as many such pairs as 16 bits hold.
template <int MOST, int N, int R, typename Weights>
inline void small_dots(I16* sums, Weights w, const int8_t* x, size_t stride) {
    constexpr int fit = 32767 / (MOST * 127 * 2), step = fit < N ? fit : N;
    static_assert(fit > 0 && N % step == 0);
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8
    for (int from = 0; from < N; from += step) {
        __m256i a[R], b[R];
#pragma GCC unroll 8
        for (int j = from; j < from + step; ++j) {
            const B64& four = w(j);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const __m256i s = four_of(x + size_t(r) * stride + 4 * j);
                const __m256i p = _mm256_maddubs_epi16(four.a, s);
                const __m256i q = _mm256_maddubs_epi16(four.b, s);
                a[r] = j == from ? p : _mm256_add_epi16(a[r], p);
                b[r] = j == from ? q : _mm256_add_epi16(b[r], q);
                pin(a[r], b[r]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
            sums[r] = add(sums[r], {_mm256_madd_epi16(a[r], ones), _mm256_madd_epi16(b[r], ones)});
    }
}

// The weights' signs go to the activations: 128 * 127 * 2 fits in 16 bits.
template <int N, int R, typename Weights>
inline void full_dots(I16* sums, Weights w, const int8_t* x, size_t stride) {
    const __m256i ones = _mm256_set1_epi16(1), top = _mm256_set1_epi8(-128);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[r] = splat_i(0);
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
        const B64& four = w(j);
        const __m256i a = _mm256_xor_si256(four.a, top), b = _mm256_xor_si256(four.b, top);
        const __m256i size_a = _mm256_abs_epi8(a), size_b = _mm256_abs_epi8(b);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const __m256i s = four_of(x + size_t(r) * stride + 4 * j);
            const __m256i p = _mm256_maddubs_epi16(size_a, _mm256_sign_epi8(s, a));
            const __m256i q = _mm256_maddubs_epi16(size_b, _mm256_sign_epi8(s, b));
            sums[r] = add(sums[r], {_mm256_madd_epi16(p, ones), _mm256_madd_epi16(q, ones)});
            pin(sums[r].a, sums[r].b);
        }
    }
}

template <int MOST, int N, int R, typename Weights>
inline void dots(I16* sums, Weights w, const int8_t* x, size_t stride) {
    if constexpr (MOST == 255)
        full_dots<N, R>(sums, w, x, stride);
    else
        small_dots<MOST, N, R>(sums, w, x, stride);
}

#endif

// e^x, relative error below 2e-7; e^0 is exactly 1, e^-inf is 0, and of NaN it is NaN: min and max
// give their second operand where one is NaN.
inline F16 exp(F16 x) {
    const F16 low = splat(-87.33654f), high = splat(88.02969f);
    const F16 kept = min(high, max(low, x));
    const F16 n = round(mul(kept, splat(1.44269504f)));
    F16 r = fma(n, splat(-0.693359375f), kept);
    r = fma(n, splat(2.12194440e-4f), r);
    F16 p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    const F16 value = mul(add(fma(mul(p, r), r, r), splat(1.0f)), exp2i(n));
#if HB_BITS == 512
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, low.v, _CMP_NLT_UQ), value.v)};
#else
    return {_mm256_and_ps(value.a, _mm256_cmp_ps(x.a, low.a, _CMP_NLT_UQ)),
            _mm256_and_ps(value.b, _mm256_cmp_ps(x.b, low.b, _CMP_NLT_UQ))};
#endif
}

}  // namespace HB_ISA
