// A step of a model as a list of ops over buffers: recorded once, run for any rows.
//
// Every thread walks the whole list. Two kinds of ops:
//  - split ops (products, attention) divide their outputs among the threads and end in a barrier;
//  - row ops (norms, rounding, residuals) of a step with few rows are done by every thread for
//    itself, on a copy of its own, which costs less than a barrier; with many rows they are divided.
// Threads divide outputs, never a sum, so the number of threads changes no bit.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "pool.h"

namespace hb {

constexpr int OWN_ROWS = 2;  // up to so many rows a thread does row ops for itself

enum Domain : int { ALL = 0, WANTED = 1 };  // the rows of the step, or those whose logits are wanted

struct Step {
    std::vector<int32_t> token_ids, wanted, positions, row_span;
    std::vector<Span> spans;
    const float* given = nullptr;  // [rows, width]: states from outside
    bool adapted = false;  // a span has an adapter
    int rows(Domain domain) const {
        return static_cast<int>(domain == ALL ? token_ids.size() : wanted.size());
    }
};

// A linear of the model: `updates[i]` is what adapter i adds, its weights null where that is nothing.
struct Product {
    const Weight* weight;
    const float* bias = nullptr;
    std::vector<LowRank> updates{};
};

class Program {
public:
    Program(const Kernels& kernels, Pool& pool) : kernels_(kernels), pool_(pool) {}

    // Recording. Buffers are numbers; every op returns the one it fills.
    int embed(const Weight* table, float scale);
    int given(int width);
    int concat(int first, int second);
    int rms_norm(int x, const float* weight, float eps);
    int linear(int x, const Product& product);
    int gated(int x, const Product& gate, const Product& up, Activation activation);
    int rope_and_store(int q, int k, int v, const float* q_norm, const float* k_norm,
                       const Attention& attention, const std::vector<float>& frequencies,
                       const KV* kv);
    int rope(int q, const float* q_norm, const Attention& attention,
             const std::vector<float>& frequencies);
    int attend(int q, const Attention& attention, const KV* kv);
    int route_experts(int x, int scores, const Mixture& mixture, Activation activation);
    int per_layer_inputs(int tokens, int context, const float* norm, int width, float eps,
                         float scale);
    int gate_by(int gate, int inputs, int first, Activation activation);
    int residual(int x, int update, const float* norm, float eps, const float* scalar);
    int select(int x);
    // [count, used]: the products of the clusters of `head` with the best scores, -inf elsewhere.
    int clusters(int x, int scores, const Weight* head, int count, int used);
    // The first output is soft-capped if `softcap` is above 0.
    void finish(const std::vector<int>& outputs, float softcap);

    void run(Step& step);
    // One for each output of `finish`: [rows, width] in `memory`, overwritten by the next run.
    struct Output {
        const float* values;
        int rows, width;
        std::shared_ptr<const Bytes> memory;
    };
    std::vector<Output> outputs(const Step& step) const;
    // The memory that steps of up to so many rows need for what they compute.
    size_t scratch_bytes(int rows, int wanted) const;

private:
    enum class Kind {
        EMBED, NORM, ROUND, LINEAR, GATED, ROPE_TABLE, ROPE, ATTEND, RESIDUAL, SELECT, SOFTCAP,
        ROUTE, EXPERTS_IN, EXPERTS_OUT, PER_LAYER_INPUTS, GATE_BY, GIVEN, CONCAT, CLUSTERS
    };
    struct Buffer {
        int width;
        Domain domain;
        bool rounded, own;  // int8 activations; filled by a row op
        int first = -1, last = -1, place = -1;
    };
    struct Part : Product {  // one product of a linear op
        int out;
        int inner = -1;  // what the adapters' `a` make of the rows
    };
    struct Op {
        Kind kind;
        Domain domain;
        std::vector<int> in;
        int out = -1;
        std::vector<Part> parts;
        const float *a = nullptr, *b = nullptr;
        float eps = 0, scale = 0;
        Activation activation{};
        Attention attention{};
        Mixture mixture{};
        int first = 0, width = 0;
        const KV* kv = nullptr;
        std::vector<float> frequencies;
    };
    struct Place {  // memory that buffers share, one after the other
        Domain domain;
        size_t row_bytes;
        int free_from;
        std::shared_ptr<const Bytes> memory;  // what `outputs` has given away outlives a larger one
    };

    int buffer(int width, Domain domain, bool rounded, bool own);
    Op& op(Kind kind, Domain domain, std::vector<int> in, int out);
    int rounded(int x, const Weight* weight);
    Part part(const Product& product, Domain domain, int out);
    int rope_table(const std::vector<float>& frequencies, int ahead);
    static bool is_split(Kind kind);
    void assign_places();
    int capacity_for(int rows) const { return std::max(rows, OWN_ROWS * pool_.threads()); }
    void reserve(const Step& step);

    void execute(const Step& step, int thread);
    void row_op(const Op& op, const Step& step, int thread, int row, int rows);
    void split_op(const Op& op, size_t index, const Step& step, int thread);
    void products(const Op& op, size_t index, const Step& step, int thread);
    void product(const Op& op, const Part& part, int first, int last, const Step& step, int thread);
    void gated_products(const Op& op, int first, int last, const Step& step, int thread);
    static bool adapts(const Op& op, const Step& step);
    static const LowRank* update_of(const Part& part, const Span& span);
    float* inner(const Part& part, const Span& span, int rank, const Step& step, int thread) const;
    void enter_updates(const Op& op, const Step& step, int thread);
    void add_updates(const Part& part, int first, int last, const Step& step, int thread);
    void rope(const Op& op, size_t index, const Step& step, int thread);
    void attention(const Op& op, size_t index, const Step& step, int thread);
    void attend_unit(const Op& op, const Step& step, int unit, const float* q, float* out);
    void experts_in(const Op& op, size_t index, const Step& step, int thread);
    void experts_out(const Op& op, size_t index, const Step& step, int thread);
    void clusters(const Op& op, size_t index, const Step& step, int thread);
    bool replicated(Domain domain, const Step& step) const {
        return step.rows(domain) <= OWN_ROWS;
    }
    uint8_t* base(int buffer, const Step& step, int thread) const;
    float* floats(int buffer, const Step& step, int thread) const;
    Rounded ints(int buffer, const Step& step, int thread) const;
    // The next piece [first, last) of `total` units, of `least` or more; false when none is left.
    bool take(size_t index, int total, int least, int& first, int& last);

    const Kernels& kernels_;
    Pool& pool_;
    std::vector<Buffer> buffers_;
    std::vector<Op> ops_;
    std::vector<Place> places_;
    struct Table {
        std::vector<float> frequencies;
        int ahead, buffer;
    };
    std::vector<Table> tables_;
    std::vector<std::pair<int, int>> rounded_;
    std::unique_ptr<std::atomic<int>[]> taken_;
    int capacity_[2] = {0, 0};
    std::vector<int> outputs_;
};

}  // namespace hb
