// The kernels, once for each instruction set: included by kernels_avx512.cpp and its neighbours.

#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace HB_ISA {

using hb::Activation, hb::Attention, hb::BLOCK, hb::GROUP, hb::KEY_TILE, hb::KV, hb::QUERIES,
    hb::Rounded, hb::RoundedBlock, hb::Scheme, hb::Span, hb::SUPER, hb::TILE_ROWS, hb::Turns,
    hb::Weight;

// ---- activations -----------------------------------------------------------------------------

inline float through_f16(float x) { return _cvtsh_ss(_cvtss_sh(x, 0)); }

// Rounds 32 numbers to int8, halves to even, in two halves; returns their scale, an f16 number. That
// is NaN or infinite if one of them is.
inline float round_block(const float* x, int8_t* q, I16& first, I16& second) {
    const F16 x0 = load(x), x1 = load(x + 16);
    const float scale = largest_magnitude(x0, x1) / 127.0f, stored = through_f16(scale);
    const F16 inverse = splat(stored > 0.0f ? 1.0f / scale : 0.0f);
    const F16 least = splat(-127.0f), most = splat(127.0f);
    first = to_int(min(max(mul(x0, inverse), least), most));
    second = to_int(min(max(mul(x1, inverse), least), most));
    store_i8(q, first);
    store_i8(q + 16, second);
    return stored;
}

void round_rows(const float* x, int rows, const Rounded& out, int row) {
    const size_t blocks = out.cols / BLOCK;
    for (size_t at = row * blocks; at < (row + rows) * blocks; ++at) {
        RoundedBlock& block = out.blocks[at];
        I16 first, second;
        block.scale = round_block(x + at * BLOCK, block.values, first, second);
        block.minus8 = -8 * sum(add(first, second));
        block.minus8_of_last = -8 * sum(second);
    }
}

// ---- products --------------------------------------------------------------------------------

// One pass over a group for M rows. Rows are `cols` apart in every plane of the activations.
template <int M> struct Tile {
    F16 acc[M];
    void clear() {
        for (int m = 0; m < M; ++m) acc[m] = zero();
    }
};

struct Input {
    const float* x;
    const RoundedBlock* q;
    int cols;
    size_t stride() const { return size_t(cols / BLOCK) * sizeof(RoundedBlock); }
    const RoundedBlock& block(int row, int b) const { return q[size_t(row) * (cols / BLOCK) + b]; }
};

inline Input input(const float* x, const Rounded* q, int cols, int row) {
    const size_t r = static_cast<size_t>(row);
    if (q == nullptr) return {x + r * cols, nullptr, cols};
    return {nullptr, q->blocks + r * (cols / BLOCK), cols};
}

// Calls run.template operator()<R>(m) for rows m .. m + R - 1 that are computed side by side, M in all.
template <int M, int ABREAST, int FROM = 0, typename Run> inline void abreast(Run run) {
    if constexpr (FROM < M) {
        run.template operator()<(M - FROM < ABREAST ? M - FROM : ABREAST)>(FROM);
        abreast<M, ABREAST, FROM + ABREAST>(run);
    }
}

// Runs with what gives the eight vectors of a block of weights: as they are needed, or unpacked before
// where M rows need them more than once.
template <int M, typename Weights, typename Run> inline void unpacked(Weights w, Run run) {
    if constexpr (M <= ROWS_ABREAST) {
        run(w);
    } else {
        B64 all[8];
        for (int j = 0; j < 8; ++j) all[j] = w(j);
        run([&all](int j) -> const B64& { return all[j]; });
    }
}

// acc[m] += the scaled product of block b of each row with `w`, where MOST is as in `small_dots`; the
// sums start from `minus8` times 2^SHIFT.
template <int M, int MOST, int SHIFT, typename Weights>
inline void add_block(F16* acc, Weights w, const F16& d, const Input& in, int b) {
    abreast<M, ROWS_ABREAST>([&]<int R>(int m) {
        const RoundedBlock* x = &in.block(m, b);
        const size_t stride = in.cols / BLOCK;
        I16 sums[R];
        for (int r = 0; r < R; ++r)
            sums[r] = shift_left<SHIFT>(splat_i(x[r * stride].minus8));
        dots<MOST, 8, R>(sums, w, x->values, in.stride());
        for (int r = 0; r < R; ++r)
            acc[m + r] = fma(to_float(sums[r]), mul(d, splat(x[r * stride].scale)), acc[m + r]);
    });
}

// Weights are read once and in order, but the planes of a group are several streams, and at its end
// they jump to the next group, where the hardware does not look ahead. So each is asked for AHEAD
// bytes before it is needed, over the end into the next group, and into the second-level cache,
// which can wait for more lines at once. `step` bytes are used per block.
constexpr size_t AHEAD = 8192;

template <size_t step>
inline void ahead(const Weight& w, const uint8_t* group, size_t plane, size_t plane_bytes, int b) {
    size_t at = size_t(b) * step + AHEAD;
    if (at >= plane_bytes) at += w.group_bytes - plane_bytes;
    const uint8_t* p = group + plane + at;
    for (size_t i = 0; i < step; i += 64)
        _mm_prefetch(reinterpret_cast<const char*>(p + i), _MM_HINT_T1);
}

template <int M> void q4_0(const Weight& w, const uint8_t* group, const Input& in, Tile<M>& t) {
    const int blocks = w.cols / BLOCK;
    Tile<M> sums = t;
    const auto* scales = reinterpret_cast<const uint16_t*>(group + size_t(blocks) * 256);
    for (int b = 0; b < blocks; ++b) {
        ahead<256>(w, group, 0, size_t(blocks) * 256, b);
        ahead<32>(w, group, size_t(blocks) * 256, size_t(blocks) * 32, b);
        const F16 d = load_f16(scales + size_t(b) * GROUP);
        const auto weights = [packed = group + size_t(b) * 256](int j) {
            const B64 raw = load_bytes(packed + 64 * (j % 4));
            return j < 4 ? low_nibbles(raw) : high_nibbles(raw);
        };
        unpacked<M>(weights, [&](auto w) { add_block<M, 15, 0>(sums.acc, w, d, in, b); });
    }
    t = sums;
}

// Stored as value + 128, so that the integers are unsigned.
template <int M> void q8_0(const Weight& w, const uint8_t* group, const Input& in, Tile<M>& t) {
    const int blocks = w.cols / BLOCK;
    Tile<M> sums = t;
    const auto* scales = reinterpret_cast<const uint16_t*>(group + size_t(blocks) * 512);
    for (int b = 0; b < blocks; ++b) {
        ahead<512>(w, group, 0, size_t(blocks) * 512, b);
        ahead<32>(w, group, size_t(blocks) * 512, size_t(blocks) * 32, b);
        const F16 d = load_f16(scales + size_t(b) * GROUP);
        const auto weights = [packed = group + size_t(b) * 512](int j) {
            return load_bytes(packed + 64 * j);
        };
        add_block<M, 255, 4>(sums.acc, weights, d, in, b);
    }
    t = sums;
}

// Planes: nibbles [block][4][64], mixed by pairs of blocks; scales and minima u8 [block][16];
// d and dmin f16 [super][16].
template <int M> void q4_k(const Weight& w, const uint8_t* group, const Input& in, Tile<M>& t) {
    const int blocks = w.cols / BLOCK;
    Tile<M> total = t;
    const uint8_t* scales = group + size_t(blocks) * 256;
    const uint8_t* minima = scales + size_t(blocks) * GROUP;
    const auto* d = reinterpret_cast<const uint16_t*>(minima + size_t(blocks) * GROUP);
    const uint16_t* dmin = d + size_t(w.cols / SUPER) * GROUP;
    for (int b = 0; b < blocks; ++b) {
        ahead<256>(w, group, 0, size_t(blocks) * 256, b);
        ahead<32>(w, group, size_t(blocks) * 256, size_t(blocks) * 32, b);
        B64 v[8];
        for (int j = 0; j < 8; ++j) {
            const B64 raw = load_bytes(group + size_t(b / 2) * 512 + 64 * j);
            v[j] = b % 2 ? high_nibbles(raw) : low_nibbles(raw);
        }
        const size_t super = size_t(b) / 8 * GROUP;
        const F16 scale = mul(load_f16(d + super), load_u8(scales + size_t(b) * GROUP));
        const F16 least = mul(load_f16(dmin + super), load_u8(minima + size_t(b) * GROUP));
        abreast<M, ROWS_ABREAST>([&]<int R>(int m) {
            const RoundedBlock* x = &in.block(m, b);
            I16 sums[R];
            for (int r = 0; r < R; ++r) sums[r] = splat_i(0);
            dots<15, 8, R>(sums, [&v](int j) -> const B64& { return v[j]; }, x->values, in.stride());
            for (int r = 0; r < R; ++r) {
                const RoundedBlock& own = x[size_t(r) * blocks];
                const float dx = own.scale, sum8 = float(own.minus8);
                F16& acc = total.acc[m + r];
                acc = fma(to_float(sums[r]), mul(scale, splat(dx)), acc);
                acc = fma(least, splat(sum8 * 0.125f * dx), acc);
            }
        });
    }
    t = total;
}

// Planes: low nibbles [block][4][64] as in Q4_0; high pairs of bits [block][2][64]; scales s8
// [16 weights][16]; d f16 [super][16]. Values are stored as q + 32.
template <int M> void q6_k(const Weight& w, const uint8_t* group, const Input& in, Tile<M>& t) {
    const int blocks = w.cols / BLOCK;
    Tile<M> total = t;
    const uint8_t* high = group + size_t(blocks) * 256;
    const auto* scales = reinterpret_cast<const int8_t*>(high + size_t(blocks) * 128);
    const auto* d = reinterpret_cast<const uint16_t*>(scales + size_t(blocks) * 2 * GROUP);
    for (int b = 0; b < blocks; ++b) {
        ahead<256>(w, group, 0, size_t(blocks) * 256, b);
        ahead<128>(w, group, size_t(blocks) * 256, size_t(blocks) * 128, b);
        ahead<32>(w, group, size_t(blocks) * 384, size_t(blocks) * 32, b);
        const B64 h0 = load_bytes(high + size_t(b) * 128);
        const B64 h1 = load_bytes(high + size_t(b) * 128 + 64);
        B64 v[8];
        for (int j = 0; j < 4; ++j) {
            const B64 raw = load_bytes(group + size_t(b) * 256 + 64 * j);
            v[j] = low_nibbles(raw);
            v[4 + j] = high_nibbles(raw);
        }
        v[0] = either(v[0], crumbs_high<0>(h0));
        v[1] = either(v[1], crumbs_high<1>(h0));
        v[2] = either(v[2], crumbs_high<2>(h0));
        v[3] = either(v[3], crumbs_high<3>(h0));
        v[4] = either(v[4], crumbs_high<0>(h1));
        v[5] = either(v[5], crumbs_high<1>(h1));
        v[6] = either(v[6], crumbs_high<2>(h1));
        v[7] = either(v[7], crumbs_high<3>(h1));
        const F16 super = load_f16(d + size_t(b) / 8 * GROUP);
        const F16 scale0 = mul(super, load_i8(scales + size_t(b) * 2 * GROUP));
        const F16 scale1 = mul(super, load_i8(scales + size_t(b) * 2 * GROUP + GROUP));
        abreast<M, ROWS_ABREAST>([&]<int R>(int m) {
            const RoundedBlock* x = &in.block(m, b);
            I16 first[R], second[R];
            for (int r = 0; r < R; ++r) {
                const RoundedBlock& own = x[size_t(r) * blocks];
                first[r] = splat_i(4 * (own.minus8 - own.minus8_of_last));
                second[r] = splat_i(4 * own.minus8_of_last);
            }
            const auto front = [&v](int j) -> const B64& { return v[j]; };
            const auto back = [&v](int j) -> const B64& { return v[4 + j]; };
            dots<63, 4, R>(first, front, x->values, in.stride());
            dots<63, 4, R>(second, back, x->values + 16, in.stride());
            for (int r = 0; r < R; ++r) {
                const F16 both = fma(to_float(first[r]), scale0, mul(to_float(second[r]), scale1));
                F16& acc = total.acc[m + r];
                acc = fma(both, splat(x[size_t(r) * blocks].scale), acc);
            }
        });
    }
    t = total;
}

template <int M, typename Load>
inline void plain(int cols, size_t size, const uint8_t* group, const Input& in, Tile<M>& t,
                  Load load_lanes) {
    for (int from = 0; from < cols; from += SUPER) {
        const int to = from + SUPER < cols ? from + SUPER : cols;
        abreast<M, QUERIES_ABREAST>([&]<int R>(int m) {
            F16 acc[R];
            for (int r = 0; r < R; ++r) acc[r] = t.acc[m + r];
            for (int k = from; k < to; ++k) {
                const F16 v = load_lanes(group + size_t(k) * GROUP * size);
                for (int r = 0; r < R; ++r)
                    acc[r] = fma(v, splat(in.x[size_t(m + r) * cols + k]), acc[r]);
            }
            for (int r = 0; r < R; ++r) t.acc[m + r] = acc[r];
        });
    }
}

template <int M> void accumulate(const Weight& w, int g, const Input& in, Tile<M>& t) {
    const uint8_t* group = w.group(g);
    t.clear();
    switch (w.scheme) {
        case Scheme::Q4_0: return q4_0<M>(w, group, in, t);
        case Scheme::Q8_0: return q8_0<M>(w, group, in, t);
        case Scheme::Q4_K: return q4_k<M>(w, group, in, t);
        case Scheme::Q6_K: return q6_k<M>(w, group, in, t);
        case Scheme::F32:
            return plain<M>(w.cols, 4, group, in, t, [](const uint8_t* p) {
                return load(reinterpret_cast<const float*>(p));
            });
        case Scheme::F16:
            return plain<M>(w.cols, 2, group, in, t, [](const uint8_t* p) {
                return load_f16(reinterpret_cast<const uint16_t*>(p));
            });
        case Scheme::BF16:
            return plain<M>(w.cols, 2, group, in, t, [](const uint8_t* p) {
                return load_bf16(reinterpret_cast<const uint16_t*>(p));
            });
    }
}

inline void put(float* y, F16 value, int lanes) {
    if (lanes == GROUP) return store(y, value);
    float all[GROUP];
    store(all, value);
    for (int i = 0; i < lanes; ++i) y[i] = all[i];
}

inline F16 load_some(const float* p, int lanes) {
    if (lanes == GROUP) return load(p);
    float all[GROUP] = {};
    for (int i = 0; i < lanes; ++i) all[i] = p[i];
    return load(all);
}

inline int lanes_of(const Weight& w, int g) {
    const int left = w.rows - g * GROUP;
    return left < GROUP ? left : GROUP;
}

template <int M>
void linear_tile(const Weight& w, int g, const Input& in, const float* bias, float* y,
                 int stride) {
    Tile<M> t;
    accumulate<M>(w, g, in, t);
    const int lanes = lanes_of(w, g);
    const F16 b = bias == nullptr ? zero() : load_some(bias + g * GROUP, lanes);
    for (int m = 0; m < M; ++m) {
        const F16 value = bias == nullptr ? t.acc[m] : add(t.acc[m], b);
        put(y + size_t(m) * stride + g * GROUP, value, lanes);
    }
}

inline F16 sigmoid(F16 x) { return div(splat(1.0f), add(splat(1.0f), exp(sub(zero(), x)))); }

inline F16 activate(F16 x, Activation act) {
    if (act == Activation::SILU) return mul(x, sigmoid(x));
    // 0.5 x (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
    const F16 cube = mul(mul(x, x), x);
    const F16 u2 = mul(splat(1.5957691216f), fma(splat(0.044715f), cube, x));
    return mul(x, sigmoid(u2));
}

template <int M>
void gated_tile(const Weight& gate, const Weight& up, int g, const Input& in,
                const float* gate_bias, const float* up_bias, Activation act, float* y,
                int stride) {
    Tile<M> left, right;
    accumulate<M>(gate, g, in, left);
    accumulate<M>(up, g, in, right);
    const int lanes = lanes_of(gate, g);
    for (int m = 0; m < M; ++m) {
        F16 a = left.acc[m], b = right.acc[m];
        if (gate_bias != nullptr) a = add(a, load_some(gate_bias + g * GROUP, lanes));
        if (up_bias != nullptr) b = add(b, load_some(up_bias + g * GROUP, lanes));
        put(y + size_t(m) * stride + g * GROUP, mul(activate(a, act), b), lanes);
    }
}

// Calls run.template operator()<M>(row, rows of the tile) over tiles of at most TILE_ROWS rows.
template <typename Run> inline void over_tiles(int row, int rows, Run run) {
    while (rows > 0) {
        switch (rows < TILE_ROWS ? rows : TILE_ROWS) {
            case 1: run.template operator()<1>(row); break;
            case 2: run.template operator()<2>(row); break;
            case 3: run.template operator()<3>(row); break;
            case 4: run.template operator()<4>(row); break;
            case 5: run.template operator()<5>(row); break;
            case 6: run.template operator()<6>(row); break;
            case 7: run.template operator()<7>(row); break;
            default: run.template operator()<8>(row); break;
        }
        row += TILE_ROWS;
        rows -= TILE_ROWS;
    }
}

// Rows whose activations stay in the second-level cache while all groups pass by.
constexpr size_t KEPT = HB_BITS == 512 ? 768 << 10 : 320 << 10;
constexpr int MOST_KEPT = 64;

inline int rows_kept(const Rounded* q, int cols) {
    const size_t bytes = q == nullptr ? size_t(cols) * 4 : cols / BLOCK * sizeof(RoundedBlock);
    const int rows = int(KEPT / bytes) / TILE_ROWS * TILE_ROWS;
    return rows < TILE_ROWS ? TILE_ROWS : rows < MOST_KEPT ? rows : MOST_KEPT;
}

void linear(const Weight& w, int first, int last, const float* x, const Rounded* q, int row,
            int rows, const float* bias, float* y, int stride) {
    const int kept = rows_kept(q, w.cols);
    for (int top = row; top < row + rows; top += kept) {
        const int some = row + rows - top < kept ? row + rows - top : kept;
        for (int g = first; g < last; ++g) {
            over_tiles(top, some, [&]<int M>(int r) {
                linear_tile<M>(w, g, input(x, q, w.cols, r), bias, y + size_t(r) * stride,
                               stride);
            });
        }
    }
}

template <int M>
void add_tile(const Weight& w, int g, const Input& in, float scale, float* y, int stride) {
    Tile<M> t;
    accumulate<M>(w, g, in, t);
    const int lanes = lanes_of(w, g);
    for (int m = 0; m < M; ++m) {
        float* at = y + size_t(m) * stride + g * GROUP;
        put(at, add(load_some(at, lanes), mul(splat(scale), t.acc[m])), lanes);
    }
}

void add_scaled(const Weight& w, int first, int last, const float* x, int row, int rows,
                float scale, float* y, int stride) {
    for (int g = first; g < last; ++g) {
        over_tiles(row, rows, [&]<int M>(int r) {
            add_tile<M>(w, g, input(x, nullptr, w.cols, r), scale, y + size_t(r) * stride, stride);
        });
    }
}

void gated(const Weight& gate, const Weight& up, int first, int last, const float* x,
           const Rounded* q, int row, int rows, const float* gate_bias, const float* up_bias,
           Activation act, float* y, int stride) {
    const int kept = rows_kept(q, gate.cols);
    for (int top = row; top < row + rows; top += kept) {
        const int some = row + rows - top < kept ? row + rows - top : kept;
        for (int g = first; g < last; ++g) {
            over_tiles(top, some, [&]<int M>(int r) {
                gated_tile<M>(gate, up, g, input(x, q, gate.cols, r), gate_bias, up_bias, act,
                              y + size_t(r) * stride, stride);
            });
        }
    }
}

// One row of the packed weight. A lane of the group is the row.
void embed(const Weight& w, int id, float scale, float* y) {
    const int lane = id % GROUP, blocks = w.cols / BLOCK;
    const uint8_t* group = w.group(id / GROUP);
    const auto f16 = [](const uint8_t* plane, size_t index) {
        uint16_t bits;
        std::memcpy(&bits, plane + 2 * index, 2);
        return _cvtsh_ss(bits);
    };
    // Weight k of a block: byte k % 4 of the lane's word in vector (k / 4) % 4.
    const auto byte = [&](const uint8_t* plane, int k) {
        return plane[64 * (k / 4 % 4) + 4 * lane + k % 4];
    };
    for (int k = 0; k < w.cols; ++k) {
        const size_t b = k / BLOCK;
        const int i = k % BLOCK;
        float value = 0.0f;
        switch (w.scheme) {
            case Scheme::F32:
                std::memcpy(&value, group + 4 * (size_t(k) * GROUP + lane), 4);
                break;
            case Scheme::F16: value = f16(group, size_t(k) * GROUP + lane); break;
            case Scheme::BF16: {
                uint32_t bits = 0;
                std::memcpy(reinterpret_cast<uint8_t*>(&bits) + 2,
                            group + 2 * (size_t(k) * GROUP + lane), 2);
                std::memcpy(&value, &bits, 4);
                break;
            }
            case Scheme::Q8_0: {
                const int q = group[b * 512 + 64 * (i / 4) + 4 * lane + i % 4] - 128;
                value = float(q) * f16(group + size_t(blocks) * 512, b * GROUP + lane);
                break;
            }
            case Scheme::Q4_0: {
                const int both = byte(group + b * 256, i % 16);
                const int q = (i < 16 ? both & 15 : both >> 4) - 8;
                value = float(q) * f16(group + size_t(blocks) * 256, b * GROUP + lane);
                break;
            }
            case Scheme::Q4_K: {
                const uint8_t* scales = group + size_t(blocks) * 256;
                const uint8_t* minima = scales + size_t(blocks) * GROUP;
                const uint8_t* d = minima + size_t(blocks) * GROUP;
                const uint8_t* dmin = d + size_t(w.cols / SUPER) * GROUP * 2;
                const int both = group[b / 2 * 512 + 64 * (i / 4) + 4 * lane + i % 4];
                const int q = b % 2 ? both >> 4 : both & 15;
                const size_t super = b / 8 * GROUP + lane;
                value = f16(d, super) * float(scales[b * GROUP + lane]) * float(q) -
                        f16(dmin, super) * float(minima[b * GROUP + lane]);
                break;
            }
            case Scheme::Q6_K: {
                const uint8_t* high = group + size_t(blocks) * 256;
                const uint8_t* scales = high + size_t(blocks) * 128;
                const uint8_t* d = scales + size_t(blocks) * 2 * GROUP;
                const int both = byte(group + b * 256, i % 16);
                const int crumb = high[b * 128 + 64 * (i / 16) + 4 * lane + i % 4];
                const int q = ((i < 16 ? both & 15 : both >> 4) |
                               ((crumb >> (2 * (i / 4 % 4))) & 3) << 4) - 32;
                const auto s = static_cast<int8_t>(scales[(2 * b + i / 16) * GROUP + lane]);
                value = f16(d, b / 8 * GROUP + lane) * float(s) * float(q);
                break;
            }
        }
        y[k] = value * scale;
    }
}

// ---- rows ------------------------------------------------------------------------------------

inline float mean_square(const float* x, int width) {
    F16 a = zero(), b = zero();
    int i = 0;
    for (; i + 32 <= width; i += 32) {
        const F16 p = load(x + i), q = load(x + i + 16);
        a = fma(p, p, a);
        b = fma(q, q, b);
    }
    for (; i < width; i += GROUP) {
        const F16 p = load_some(x + i, width - i < GROUP ? width - i : GROUP);
        a = fma(p, p, a);
    }
    return sum(add(a, b)) / float(width);
}

template <typename Each> inline void over_lanes(int width, Each each) {
    for (int i = 0; i < width; i += GROUP) each(i, width - i < GROUP ? width - i : GROUP);
}

void rms_norm(const float* x, const float* weight, int width, float eps, float* y) {
    const F16 factor = splat(1.0f / std::sqrt(mean_square(x, width) + eps));
    over_lanes(width, [&](int i, int lanes) {
        F16 value = mul(load_some(x + i, lanes), factor);
        if (weight != nullptr) value = mul(value, load_some(weight + i, lanes));
        put(y + i, value, lanes);
    });
}

void residual(float* x, const float* update, const float* norm, float eps, const float* scalar,
              int width, float* y) {
    F16 factor = splat(1.0f);
    if (norm != nullptr) factor = splat(1.0f / std::sqrt(mean_square(update, width) + eps));
    over_lanes(width, [&](int i, int lanes) {
        F16 u = load_some(update + i, lanes);
        if (norm != nullptr) u = mul(mul(u, factor), load_some(norm + i, lanes));
        F16 value = add(load_some(x + i, lanes), u);
        if (scalar != nullptr) value = mul(value, splat(*scalar));
        put(y + i, value, lanes);
    });
}

void rotate(float* head, const float* norm, int dim, float eps, const float* cos,
            const float* sin) {
    if (norm != nullptr) rms_norm(head, norm, dim, eps, head);
    const int half = dim / 2;
    over_lanes(half, [&](int i, int lanes) {
        const F16 c = load_some(cos + i, lanes), s = load_some(sin + i, lanes);
        const F16 a = load_some(head + i, lanes), b = load_some(head + half + i, lanes);
        put(head + i, sub(mul(a, c), mul(b, s)), lanes);
        put(head + half + i, fma(a, s, mul(b, c)), lanes);
    });
}

void softcap(float* x, int count, float cap) {
    // tanh(u) = 2 sigmoid(2 u) - 1
    const F16 factor = splat(2.0f / cap);
    over_lanes(count, [&](int i, int lanes) {
        const F16 s = sigmoid(mul(load_some(x + i, lanes), factor));
        put(x + i, fma(s, splat(2.0f * cap), splat(-cap)), lanes);
    });
}

float read_bytes(const uint8_t* p, size_t bytes) {
    B64 a = load_bytes(p), b = a, c = a, d = a;
    for (size_t i = 0; i + 256 <= bytes; i += 256) {
        a = either(a, load_bytes(p + i));
        b = either(b, load_bytes(p + i + 64));
        c = either(c, load_bytes(p + i + 128));
        d = either(d, load_bytes(p + i + 192));
    }
    return static_cast<float>(sum(words(either(either(a, b), either(c, d)))));
}

void gate_by(const float* gate, const float* by, int width, Activation act, float* y) {
    over_lanes(width, [&](int i, int lanes) {
        put(y + i, mul(activate(load_some(gate + i, lanes), act), load_some(by + i, lanes)), lanes);
    });
}

// ---- attention -------------------------------------------------------------------------------

inline uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The cells of a head: keys [cells / 16][dim][16], values [cells][dim padded to lanes].
inline int padded(const KV& kv) { return (kv.dim + GROUP - 1) / GROUP * GROUP; }

template <typename T> inline T* keys_of(const KV& kv, int head, size_t cell) {
    return reinterpret_cast<T*>(kv.keys) + (size_t(head) * kv.cells + cell) * kv.dim;
}

template <typename T> inline T* values_of(const KV& kv, int head, size_t cell) {
    return reinterpret_cast<T*>(kv.values) + (size_t(head) * kv.cells + cell) * padded(kv);
}

template <typename T, typename Convert>
inline void store_as(const KV& kv, size_t cell, int head, const float* k, const float* v,
                     Convert convert) {
    T* values = values_of<T>(kv, head, cell);
    for (int i = 0; i < kv.dim; ++i) values[i] = convert(v[i]);
    if (kv.keys == nullptr) return;
    T* keys = keys_of<T>(kv, head, cell / 16 * 16) + cell % 16;
    for (int i = 0; i < kv.dim; ++i) keys[size_t(i) * 16] = convert(k[i]);
}

// x times the orthonormal Hadamard matrix, which is its own inverse; in blocks of the largest power
// of two that divides `dim`.
void hadamard(float* x, int dim) {
    const int block = dim & -dim;
    const float scale = 1.0f / std::sqrt(static_cast<float>(block));
    for (int start = 0; start < dim; start += block) {
        for (int half = 1; half < block; half *= 2)
            for (int i = start; i < start + block; i += 2 * half)
                for (int j = i; j < i + half; ++j) {
                    const float a = x[j], b = x[j + half];
                    x[j] = a + b;
                    x[j + half] = a - b;
                }
    }
    for (int i = 0; i < dim; ++i) x[i] *= scale;
}

void store_q8(const KV& kv, size_t cell, int head, const float* k, const float* v) {
    const int blocks = kv.dim / BLOCK;
    float turned[hb::LARGEST_DIM];
    int8_t rounded[BLOCK];
    I16 first, second;
    int8_t* keys = keys_of<int8_t>(kv, head, cell / 16 * 16) + cell % 16;
    float* key_scales = kv.key_scales + (size_t(head) * kv.cells + cell / 16 * 16) * blocks;
    std::memcpy(turned, k, size_t(kv.dim) * 4);
    hadamard(turned, kv.dim);
    for (int b = 0; b < blocks; ++b) {
        key_scales[b * 16 + cell % 16] = round_block(turned + b * BLOCK, rounded, first, second);
        for (int i = 0; i < BLOCK; ++i) keys[size_t(b * BLOCK + i) * 16] = rounded[i];
    }
    float* value_scales = kv.value_scales + (size_t(head) * kv.cells + cell) * blocks;
    std::memcpy(turned, v, size_t(kv.dim) * 4);
    hadamard(turned, kv.dim);
    for (int b = 0; b < blocks; ++b)
        value_scales[b] = round_block(
            turned + b * BLOCK, values_of<int8_t>(kv, head, cell) + b * BLOCK, first, second);
}

void store_kv(const KV& kv, size_t cell, int head, const float* k, const float* v) {
    if (kv.kind == hb::Cell::Q8_0) return store_q8(kv, cell, head, k, v);
    if (kv.kind == hb::Cell::F32) return store_as<float>(kv, cell, head, k, v, [](float x) { return x; });
    store_as<uint16_t>(kv, cell, head, k, v, to_bf16);
}

inline F16 lanes(const float* p) { return load(p); }
inline F16 lanes(const uint16_t* p) { return load_bf16(p); }
inline F16 lanes(const int8_t* p) { return load_i8(p); }

// Scores of 16 positions for Q queries, before the scale: the sum over D in ascending order (in
// Q8_0, of blocks of 32).
template <typename T, int Q>
inline void scores_of(const KV& kv, int head, size_t cell, const float* const* q, F16* acc) {
    const T* k = keys_of<T>(kv, head, cell);
    for (int i = 0; i < Q; ++i) acc[i] = zero();
    if constexpr (sizeof(T) == 1) {
        const int blocks = kv.dim / BLOCK;
        const float* scales = kv.key_scales + (size_t(head) * kv.cells + cell) * blocks;
        for (int b = 0; b < blocks; ++b) {
            F16 part[Q];
            for (int i = 0; i < Q; ++i) part[i] = zero();
            for (int d = b * BLOCK; d < (b + 1) * BLOCK; ++d) {
                const F16 column = lanes(k + size_t(d) * 16);
                for (int i = 0; i < Q; ++i) part[i] = fma(column, splat(q[i][d]), part[i]);
            }
            const F16 scale = load(scales + b * 16);
            for (int i = 0; i < Q; ++i) acc[i] = fma(part[i], scale, acc[i]);
        }
    } else {
        for (int d = 0; d < kv.dim; ++d) {
            const F16 column = lanes(k + size_t(d) * 16);
            for (int i = 0; i < Q; ++i) acc[i] = fma(column, splat(q[i][d]), acc[i]);
        }
    }
}

// Cells without keys. A key turns by its place in the tile alone; the queries turn back by the start
// of the tile, and bring the norm's weight where nothing turns.
template <int Q>
inline void weigh_queries(const KV& kv, const float* const* q, float (*out)[hb::LARGEST_DIM]) {
    for (int i = 0; i < Q; ++i)
        for (int d = 0; d < kv.dim; ++d) out[i][d] = q[i][d] * kv.turns.norm[d];
}

template <int Q>
inline void turn_queries(const KV& kv, int tile, const float* const* q,
                         float (*out)[hb::LARGEST_DIM]) {
    const Turns& t = kv.turns;
    const int half = kv.dim / 2;
    const float *cos1 = t.row(KEY_TILE + tile / KEY_TILE % KEY_TILE), *sin1 = cos1 + t.pairs;
    const float *cos2 = t.row(2 * KEY_TILE + tile / KEY_TILE / KEY_TILE), *sin2 = cos2 + t.pairs;
    for (int d = 0; d < t.pairs; d += GROUP) {
        const F16 c1 = load(cos1 + d), s1 = load(sin1 + d), c2 = load(cos2 + d), s2 = load(sin2 + d);
        const F16 c = sub(mul(c1, c2), mul(s1, s2)), s = fma(s1, c2, mul(c1, s2));
        for (int i = 0; i < Q; ++i) {
            const F16 x = load(q[i] + d), y = load(q[i] + half + d);
            store(out[i] + d, fma(y, s, mul(x, c)));
            store(out[i] + half + d, sub(mul(y, c), mul(x, s)));
        }
    }
}

// Sixteen pairs of a value become those of a key. Models have seen angles that are rounded to f32,
// so what that rounding adds is turned, too; it is small enough to be its own sine.
inline void turn_pairs(const Turns& t, int position, int d, int half, F16& first, F16& second) {
    const float* cos = t.row(position % KEY_TILE);
    const F16 a = mul(first, load(t.norm + d)), b = mul(second, load(t.norm + half + d));
    const F16 c = load(cos + d), s = load(cos + t.pairs + d);
    const F16 x = sub(mul(a, c), mul(b, s)), y = fma(a, s, mul(b, c));
    const F16 frequency = load(t.frequencies + d), p = splat(float(position));
    const F16 added = fma(splat(-float(position)), frequency, mul(p, frequency));
    first = sub(x, mul(y, added));
    second = fma(x, added, y);
}

// The scores of 16 positions. A lane holds one of every 16 of D, so the sum over D is 16 sums, which
// are added up at the end.
template <typename T, int Q>
inline void scores_of_values(const KV& kv, int head, size_t cell, int position,
                             const float (*q)[hb::LARGEST_DIM], F16* acc) {
    const int half = kv.dim / 2;
    float scores[GROUP][QUERIES];
    for (int p = 0; p < GROUP; ++p) {
        const T *v = values_of<T>(kv, head, cell + p), *w = v + half;
        F16 sums[QUERIES];
        for (int i = 0; i < QUERIES; ++i) sums[i] = zero();
        for (int d = 0; d < half; d += GROUP) {
            F16 first = lanes(v + d), second = lanes(w + d);
            if (d < kv.turns.pairs) turn_pairs(kv.turns, position + p, d, half, first, second);
            for (int i = 0; i < Q; ++i) sums[i] = fma(first, load(q[i] + d), sums[i]);
            for (int i = 0; i < Q; ++i) sums[i] = fma(second, load(q[i] + half + d), sums[i]);
        }
        sum_eight(sums, scores[p]);
    }
    for (int i = 0; i < Q; ++i) {
        float column[GROUP];
        for (int p = 0; p < GROUP; ++p) column[p] = scores[p][i];
        acc[i] = load(column);
    }
}

inline size_t first_cell(const KV& kv, const Span& span, int position) {
    if (kv.sliding) return size_t(span.ring) * kv.stride + position % kv.stride;
    return size_t(span.pages[position / kv.stride]) * kv.stride + position % kv.stride;
}

constexpr float NOTHING = -1e30f;  // finite: a query that has seen nothing makes no NaN

template <typename T, int Q>
void attend_queries(const KV& kv, const Attention& a, const Span& span, int kv_head,
                    const int* positions, const float* const* q, float* const* out) {
    const int dim = kv.dim;
    int newest = 0, oldest = positions[0];
    float maximum[Q], total[Q];
    for (int i = 0; i < Q; ++i) {
        newest = positions[i] > newest ? positions[i] : newest;
        oldest = positions[i] < oldest ? positions[i] : oldest;
        maximum[i] = NOTHING;
        total[i] = 0.0f;
        for (int d = 0; d < dim; ++d) out[i][d] = 0.0f;
    }
    const int low = a.window && oldest - a.window + 1 > 0 ? oldest - a.window + 1 : 0;
    alignas(64) float weights[Q][KEY_TILE];
    alignas(64) float turned[Q][hb::LARGEST_DIM];
    if (kv.keys == nullptr) weigh_queries<Q>(kv, q, turned);
    for (int tile = low / KEY_TILE * KEY_TILE; tile <= newest; tile += KEY_TILE) {
        const size_t cell = first_cell(kv, span, tile);
        const T* values = values_of<T>(kv, kv_head, cell);
        if (kv.keys == nullptr) turn_queries<Q>(kv, tile, q, turned);
        for (int part = 0; part < KEY_TILE; part += 16) {
            F16 acc[Q];
            if (kv.keys != nullptr)
                abreast<Q, QUERIES_ABREAST>([&]<int R>(int i) {
                    scores_of<T, R>(kv, kv_head, cell + part, q + i, acc + i);
                });
            else
                scores_of_values<T, Q>(kv, kv_head, cell + part, tile + part, turned, acc);
            const I16 places = add(splat_i(tile + part), iota());
            for (int i = 0; i < Q; ++i) {
                const int first = a.window ? positions[i] - a.window + 1 : 0;
                const Mask seen = both(less_equal(places, splat_i(positions[i])),
                                       less_equal(splat_i(first), places));
                const F16 score = mul(acc[i], splat(a.scale));
                store(weights[i] + part, choose(seen, score, splat(-INFINITY)));
            }
        }
        for (int i = 0; i < Q; ++i) {
            F16 s[4];
            for (int p = 0; p < 4; ++p) s[p] = load(weights[i] + 16 * p);
            const float peak = largest(max(max(s[0], s[1]), max(s[2], s[3])));
            const float top = peak > maximum[i] ? peak : maximum[i];
            for (int p = 0; p < 4; ++p) {
                s[p] = exp(sub(s[p], splat(top)));
                store(weights[i] + 16 * p, s[p]);
            }
            const float here = sum(add(add(s[0], s[1]), add(s[2], s[3])));
            if (top != maximum[i]) {
                float fade[GROUP];
                store(fade, exp(splat(maximum[i] - top)));
                total[i] *= fade[0];
                over_lanes(dim, [&](int d, int some) {
                    put(out[i] + d, mul(load_some(out[i] + d, some), splat(fade[0])), some);
                });
                maximum[i] = top;
            }
            total[i] += here;
        }
        const int count = newest - tile + 1 < KEY_TILE ? newest - tile + 1 : KEY_TILE;
        over_lanes(dim, [&](int d, int some) {
            abreast<Q, QUERIES_ABREAST>([&]<int R>(int i) {
                F16 acc[R];
                for (int r = 0; r < R; ++r) acc[r] = load_some(out[i + r] + d, some);
                for (int p = 0; p < count; ++p) {
                    F16 value = lanes(values + size_t(p) * padded(kv) + d);
                    if constexpr (sizeof(T) == 1) {
                        const size_t at = (size_t(kv_head) * kv.cells + cell + p) * (dim / BLOCK);
                        value = mul(value, splat(kv.value_scales[at + d / BLOCK]));
                    }
                    for (int r = 0; r < R; ++r)
                        acc[r] = fma(value, splat(weights[i + r][p]), acc[r]);
                }
                for (int r = 0; r < R; ++r) put(out[i + r] + d, acc[r], some);
            });
        });
    }
    for (int i = 0; i < Q; ++i)
        over_lanes(dim, [&](int d, int some) {
            put(out[i] + d, div(load_some(out[i] + d, some), splat(total[i])), some);
        });
}

template <typename T>
void attend_as(const KV& kv, const Attention& a, const Span& span, int kv_head, int count,
               const int* positions, const float* const* q, float* const* out) {
    switch (count) {
        case 1: attend_queries<T, 1>(kv, a, span, kv_head, positions, q, out); break;
        case 2: attend_queries<T, 2>(kv, a, span, kv_head, positions, q, out); break;
        case 3: attend_queries<T, 3>(kv, a, span, kv_head, positions, q, out); break;
        case 4: attend_queries<T, 4>(kv, a, span, kv_head, positions, q, out); break;
        case 5: attend_queries<T, 5>(kv, a, span, kv_head, positions, q, out); break;
        case 6: attend_queries<T, 6>(kv, a, span, kv_head, positions, q, out); break;
        case 7: attend_queries<T, 7>(kv, a, span, kv_head, positions, q, out); break;
        default: attend_queries<T, 8>(kv, a, span, kv_head, positions, q, out); break;
    }
}

// In Q8_0 the queries are rotated like the keys, and the mixed values are rotated back.
void attend_q8(const KV& kv, const Attention& a, const Span& span, int kv_head, int count,
               const int* positions, const float* const* q, float* const* out) {
    float turned[QUERIES][hb::LARGEST_DIM];
    const float* queries[QUERIES];
    for (int i = 0; i < count; ++i) {
        std::memcpy(turned[i], q[i], size_t(kv.dim) * 4);
        hadamard(turned[i], kv.dim);
        queries[i] = turned[i];
    }
    attend_as<int8_t>(kv, a, span, kv_head, count, positions, queries, out);
    for (int i = 0; i < count; ++i) hadamard(out[i], kv.dim);
}

void attend(const KV& kv, const Attention& a, const Span& span, int kv_head, int count,
            const int* positions, const float* const* q, float* const* out) {
    const auto run = kv.kind == hb::Cell::Q8_0  ? attend_q8
                     : kv.kind == hb::Cell::F32 ? attend_as<float>
                                                : attend_as<uint16_t>;
    run(kv, a, span, kv_head, count, positions, q, out);
}

const hb::Kernels TABLE = {HB_NAME,  round_rows, linear, add_scaled, gated,   embed,      rms_norm,
                           residual, rotate,     store_kv, attend,   softcap, read_bytes, gate_by};

}  // namespace HB_ISA
