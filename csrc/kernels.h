// What a kernel file provides, as a table of functions: one table per instruction set.
//
// Weights are packed in groups of 16 output rows; a lane is a row. For every row of activations and
// every output, the sum over K runs block by block in ascending order, in one lane, with the same
// instructions whatever the number of rows: that is the determinism contract.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hb {

constexpr int GROUP = 16;     // output rows side by side
constexpr int BLOCK = 32;     // weights that share a scale, and activations that do
constexpr int SUPER = 256;    // weights of a K-quant superblock
constexpr int TILE_ROWS = 8;  // rows of activations that one pass over a group serves
constexpr int KEY_TILE = 64;  // positions per attention tile, aligned to absolute positions
constexpr int QUERIES = 8;    // (row, head) pairs that one pass over the keys serves

enum class Scheme : int { F32, F16, BF16, Q8_0, Q4_0, Q4_K, Q6_K };

// Whether the activations of a product are rounded to int8.
inline bool takes_integers(Scheme scheme) {
    return scheme != Scheme::F32 && scheme != Scheme::F16 && scheme != Scheme::BF16;
}

// A packed weight [rows, cols]. Planes of a group lie one after the other; groups are contiguous.
struct Weight {
    Scheme scheme;
    int rows, cols;
    size_t group_bytes;
    uint8_t* data;
    int groups() const { return (rows + GROUP - 1) / GROUP; }
    const uint8_t* group(int g) const { return data + group_bytes * static_cast<size_t>(g); }
};

// What an adapter adds to a product, scale * (b @ (a @ x)); a [rank, cols], b [rows, rank], of floats.
struct LowRank {
    const Weight *a, *b;
    float scale;
};

// BLOCK activations as int8, their scale (an f16 number), and -8 times the sum of all of them and of
// the last 16. What belongs together lies together: a kernel needs one pointer for each row.
struct RoundedBlock {
    int8_t values[BLOCK];
    float scale;
    int32_t minus8, minus8_of_last;
};

// Activations [rows, cols / BLOCK].
struct Rounded {
    RoundedBlock* blocks;
    int cols;
};

enum class Activation : int { SILU, GELU_TANH };

// A mixture: `gate_up` [experts * 2 * width, cols], each expert's gate rows before its up rows;
// `down` [experts * hidden, width]; `scale` [experts]. A row goes through `used` of them.
struct Mixture {
    const Weight *gate_up, *down;
    const float* scale;
    int experts, used, width;
    float score_scale;
};

// How keys are made of values: times `norm`, then the first `pairs` of the pairs (i, i + D / 2) turn by
// position * frequencies[i]. Both numbers of pairs are whole groups. The table has rows of `pairs`
// cosines, then as many sines: of 0 .. 63, of 64 times that, and of 4096 times anything, since the
// rotation of a position is that of its digits of base 64, one after the other.
struct Turns {
    const float *norm, *frequencies, *table;
    int pairs;
    const float* row(int index) const { return table + size_t(index) * 2 * size_t(pairs); }
};

enum class Cell : int { F32, BF16, Q8_0 };

// One layer's keys and values. Keys are transposed by 16 positions: [head][cell / 16][D][16].
// In Q8_0 both are rotated by a Hadamard matrix and rounded to int8 per 32 of D; the scales are
// [head][cell / 16][D / 32][16] of the keys and [head][cell][D / 32] of the values.
// Without `keys`, a key is made of its value by `turns`.
struct KV {
    int heads, dim, stride;
    bool sliding;
    Cell kind;
    size_t cells;
    uint8_t *keys, *values;
    float *key_scales, *value_scales;
    Turns turns;
};

constexpr int LARGEST_DIM = 1024;

struct Attention {
    int heads, kv_heads, dim, window;  // window 0: all positions
    float scale, eps;
    bool value_norm;
    int ahead;  // queries are rotated as if so many positions later
};

// Consecutive positions [start, start + count) of one sequence; they are rows [row, row + count).
// `adapter` is an index into the updates of every product, or -1.
struct Span {
    int row, start, count, ring, adapter;
    const int32_t* pages;
};

struct Kernels {
    const char* name;
    // Rounds `rows` rows of x [rows, cols].
    void (*round)(const float* x, int rows, const Rounded& out, int row);
    // y[row, 16 g ..] for the rows [row, row + rows) and the groups [first, last).
    void (*linear)(const Weight& w, int first, int last, const float* x, const Rounded* q, int row,
                   int rows, const float* bias, float* y, int stride);
    // y += scale * (x @ w.T), otherwise as `linear`; for weights of floats.
    void (*add_scaled)(const Weight& w, int first, int last, const float* x, int row, int rows,
                       float scale, float* y, int stride);
    // As `linear`, act(gate) * up; both weights have one shape and scheme.
    void (*gated)(const Weight& gate, const Weight& up, int first, int last, const float* x,
                  const Rounded* q, int row, int rows, const float* gate_bias,
                  const float* up_bias, Activation act, float* y, int stride);
    void (*embed)(const Weight& w, int id, float scale, float* y);
    void (*rms_norm)(const float* x, const float* weight, int width, float eps, float* y);
    void (*residual)(float* x, const float* update, const float* norm, float eps,
                     const float* scalar, int width, float* y);
    // Norms and rotates one head of one row. `cos`, `sin`: [dim / 2]
    void (*rotate)(float* head, const float* norm, int dim, float eps, const float* cos,
                   const float* sin);
    // `k` is not read where the cells have no keys.
    void (*store)(const KV& kv, size_t cell, int head, const float* k, const float* v);
    // At most QUERIES of one span and one key/value head; q and out are pointers to [dim].
    void (*attend)(const KV& kv, const Attention& a, const Span& span, int kv_head, int count,
                   const int* positions, const float* const* q, float* const* out);
    void (*softcap)(float* x, int count, float cap);
    // Reads the bytes and does nothing with them: the memory's speed limit.
    float (*read)(const uint8_t* p, size_t bytes);
    // y = act(gate) * by
    void (*gate_by)(const float* gate, const float* by, int width, Activation act, float* y);
};

const Kernels& kernels_avx512();
const Kernels& kernels_avxvnni();
const Kernels& kernels_avx2();

}  // namespace hb
