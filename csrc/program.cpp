#include "program.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "rotation.h"

namespace hb {

namespace {

size_t row_bytes_of(int width, bool rounded) {
    if (!rounded) return size_t(width) * 4;
    return size_t(width / BLOCK) * sizeof(RoundedBlock);
}

// How the attention of a span is cut: up to `rows` rows and `heads` of the `group` heads that share a
// key/value head make a unit of at most QUERIES (row, head) pairs.
struct Units {
    int group, heads, rows, parts, kv_heads;
    explicit Units(const Attention& a)
        : group(a.heads / a.kv_heads),
          heads(std::min(group, QUERIES)),
          rows(std::max(1, QUERIES / group)),
          parts((group + heads - 1) / heads),
          kv_heads(a.kv_heads) {}
    int of(const Span& span) const { return (span.count + rows - 1) / rows * kv_heads * parts; }
};

// The `used` likeliest experts of a row by ascending index, then their weights: the softmax over
// all, over the sum of theirs, times each one's scale. Of equal scores the lower index.
void route(const Mixture& m, const float* scores, float* out) {
    std::vector<int> order(m.experts);
    for (int e = 0; e < m.experts; ++e) order[e] = e;
    std::partial_sort(order.begin(), order.begin() + m.used, order.end(), [&](int a, int b) {
        return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
    });
    const float best = scores[order[0]];
    std::sort(order.begin(), order.begin() + m.used);
    float total = 0;
    for (int k = 0; k < m.used; ++k) {
        out[k] = static_cast<float>(order[k]);
        out[m.used + k] = std::exp((scores[order[k]] - best) * m.score_scale);
        total += out[m.used + k];
    }
    if (m.scale == nullptr) return;  // clusters have no weights
    for (int k = 0; k < m.used; ++k) out[m.used + k] *= m.scale[order[k]] / total;
}

// Rows [first, first + rows) of a weight; `first` is a whole number of groups.
Weight part_of(const Weight& w, int first, int rows) {
    return {w.scheme, rows, w.cols, w.group_bytes,
            w.data + w.group_bytes * size_t(first / GROUP)};
}

}  // namespace

// ---- recording -------------------------------------------------------------------------------

int Program::buffer(int width, Domain domain, bool rounded, bool own) {
    buffers_.push_back({width, domain, rounded, own});
    return static_cast<int>(buffers_.size()) - 1;
}

Program::Op& Program::op(Kind kind, Domain domain, std::vector<int> in, int out) {
    Op next{};
    next.kind = kind;
    next.domain = domain;
    next.in = std::move(in);
    next.out = out;
    ops_.push_back(std::move(next));
    return ops_.back();
}

int Program::embed(const Weight* table, float scale) {
    const int out = buffer(table->cols, ALL, false, true);
    Op& o = op(Kind::EMBED, ALL, {}, out);
    o.parts.push_back({{table}, out});
    o.scale = scale;
    return out;
}

int Program::given(int width) {
    const int out = buffer(width, ALL, false, true);
    op(Kind::GIVEN, ALL, {}, out);
    return out;
}

int Program::concat(int first, int second) {
    const Domain domain = buffers_[first].domain;
    const int out = buffer(buffers_[first].width + buffers_[second].width, domain, false, true);
    op(Kind::CONCAT, domain, {first, second}, out);
    return out;
}

int Program::rms_norm(int x, const float* weight, float eps) {
    const Buffer from = buffers_[x];
    const int out = buffer(from.width, from.domain, false, true);
    Op& o = op(Kind::NORM, from.domain, {x}, out);
    o.a = weight;
    o.eps = eps;
    return out;
}

int Program::rounded(int x, const Weight* weight) {
    if (!takes_integers(weight->scheme)) return -1;
    for (const auto& [from, to] : rounded_)
        if (from == x) return to;
    const Buffer from = buffers_[x];
    const int out = buffer(from.width, from.domain, true, true);
    op(Kind::ROUND, from.domain, {x}, out);
    rounded_.push_back({x, out});
    return out;
}

Program::Part Program::part(const Product& product, Domain domain, int out) {
    int rank = 0;
    for (const LowRank& update : product.updates)
        if (update.a != nullptr) rank = std::max(rank, update.a->rows);
    return {product, out, rank > 0 ? buffer(rank, domain, false, false) : -1};
}

int Program::linear(int x, const Product& product) {
    const Domain domain = buffers_[x].domain;
    const std::vector<int> in{x, rounded(x, product.weight)};
    // Products of one input are one op.
    if (ops_.empty() || ops_.back().kind != Kind::LINEAR || ops_.back().in != in)
        op(Kind::LINEAR, domain, in, -1);
    const int out = buffer(product.weight->rows, domain, false, false);
    ops_.back().parts.push_back(part(product, domain, out));
    return out;
}

int Program::gated(int x, const Product& gate, const Product& up, Activation activation) {
    const Domain domain = buffers_[x].domain;
    Op& o = op(Kind::GATED, domain, {x, rounded(x, gate.weight)}, -1);
    const int out = buffer(gate.weight->rows, domain, false, false);
    const bool adapted = !gate.updates.empty() || !up.updates.empty();
    const int apart = adapted ? buffer(up.weight->rows, domain, false, false) : out;
    o.parts = {part(gate, domain, out), part(up, domain, apart)};
    o.activation = activation;
    return out;
}

int Program::rope_table(const std::vector<float>& frequencies, int ahead) {
    for (const Table& known : tables_)
        if (known.frequencies == frequencies && known.ahead == ahead) return known.buffer;
    const int out = buffer(2 * static_cast<int>(frequencies.size()), ALL, false, true);
    Op& o = op(Kind::ROPE_TABLE, ALL, {}, out);
    o.frequencies = frequencies;
    o.first = ahead;
    tables_.push_back({frequencies, ahead, out});
    return out;
}

int Program::rope_and_store(int q, int k, int v, const float* q_norm, const float* k_norm,
                            const Attention& attention, const std::vector<float>& frequencies,
                            const KV* kv) {
    const int table = rope_table(frequencies, attention.ahead);
    Op& o = op(Kind::ROPE, ALL, {q, k, v, table}, -1);
    o.a = q_norm;
    o.b = k_norm;
    o.attention = attention;
    o.kv = kv;
    return q;  // rotated where it is
}

int Program::rope(int q, const float* q_norm, const Attention& attention,
                  const std::vector<float>& frequencies) {
    const int table = rope_table(frequencies, attention.ahead);
    Op& o = op(Kind::ROPE, ALL, {q, -1, -1, table}, -1);
    o.a = q_norm;
    o.attention = attention;
    return q;
}

// Three ops: the experts of every row and their weights; their inner activations, [row, used]; the
// sum over a row's experts.
int Program::route_experts(int x, int scores, const Mixture& mixture, Activation activation) {
    const int chosen = buffer(2 * mixture.used, ALL, false, true);
    op(Kind::ROUTE, ALL, {scores}, chosen).mixture = mixture;
    const int ints = rounded(x, mixture.gate_up);
    const int inner = buffer(mixture.used * mixture.width, ALL, false, false);
    Op& in = op(Kind::EXPERTS_IN, ALL, {x, ints, chosen}, inner);
    in.mixture = mixture;
    in.activation = activation;
    const int inner_ints = rounded(inner, mixture.down);
    const int out = buffer(mixture.down->rows / mixture.experts, ALL, false, false);
    op(Kind::EXPERTS_OUT, ALL, {inner, inner_ints, chosen}, out).mixture = mixture;
    return out;
}

int Program::per_layer_inputs(int tokens, int context, const float* norm, int width, float eps,
                              float scale) {
    const int out = buffer(buffers_[tokens].width, ALL, false, true);
    Op& o = op(Kind::PER_LAYER_INPUTS, ALL, {tokens, context}, out);
    o.a = norm;
    o.width = width;
    o.eps = eps;
    o.scale = scale;
    return out;
}

int Program::gate_by(int gate, int inputs, int first, Activation activation) {
    const int out = buffer(buffers_[gate].width, ALL, false, true);
    Op& o = op(Kind::GATE_BY, ALL, {gate, inputs}, out);
    o.first = first;
    o.activation = activation;
    return out;
}

int Program::attend(int q, const Attention& attention, const KV* kv) {
    const int out = buffer(attention.heads * attention.dim, ALL, false, false);
    Op& o = op(Kind::ATTEND, ALL, {q}, out);
    o.attention = attention;
    o.kv = kv;
    return out;
}

int Program::residual(int x, int update, const float* norm, float eps, const float* scalar) {
    const Buffer from = buffers_[x];
    const int out = buffer(from.width, from.domain, false, true);
    Op& o = op(Kind::RESIDUAL, from.domain, {x, update}, out);
    o.a = norm;
    o.b = scalar;
    o.eps = eps;
    return out;
}

int Program::select(int x) {
    const int out = buffer(buffers_[x].width, WANTED, false, true);
    op(Kind::SELECT, WANTED, {x}, out);
    return out;
}

// Which clusters a row takes is found like its experts.
int Program::clusters(int x, int scores, const Weight* head, int count, int used) {
    const Mixture mixture{head, nullptr, nullptr, count, used, head->rows / count, 1.0f};
    const int chosen = buffer(2 * used, ALL, false, true);
    op(Kind::ROUTE, ALL, {scores}, chosen).mixture = mixture;
    const int ints = rounded(x, head);
    const int out = buffer(head->rows, ALL, false, false);
    op(Kind::CLUSTERS, ALL, {x, ints, chosen}, out).mixture = mixture;
    return out;
}

void Program::finish(const std::vector<int>& outputs, float softcap) {
    outputs_ = outputs;
    const int logits = outputs.front();
    if (softcap > 0) op(Kind::SOFTCAP, buffers_[logits].domain, {logits}, -1).scale = softcap;
    assign_places();
    taken_ = std::make_unique<std::atomic<int>[]>(ops_.size());
}

bool Program::is_split(Kind kind) {
    return kind == Kind::LINEAR || kind == Kind::GATED || kind == Kind::ROPE ||
           kind == Kind::ATTEND || kind == Kind::SOFTCAP || kind == Kind::EXPERTS_IN ||
           kind == Kind::EXPERTS_OUT || kind == Kind::CLUSTERS;
}

// A place is free again once every thread has left the last op that reads it: after the barrier of
// the next split op, since row ops may have none.
void Program::assign_places() {
    const auto touch = [&](int b, int index) {
        if (b < 0) return;
        if (buffers_[b].first < 0) buffers_[b].first = index;
        buffers_[b].last = index;
    };
    const int count = static_cast<int>(ops_.size());
    for (int i = 0; i < count; ++i) {
        for (int b : ops_[i].in) touch(b, i);
        touch(ops_[i].out, i);
        for (const Part& part : ops_[i].parts) {
            touch(part.out, i);
            touch(part.inner, i);
        }
    }
    for (int b : outputs_) buffers_[b].last = count;
    std::vector<int> order(buffers_.size());
    for (size_t b = 0; b < order.size(); ++b) order[b] = static_cast<int>(b);
    std::sort(order.begin(), order.end(),
              [&](int a, int b) { return buffers_[a].first < buffers_[b].first; });
    for (int b : order) {
        Buffer& buffer = buffers_[b];
        int until = buffer.last;
        while (until < count && !is_split(ops_[until].kind)) ++until;
        const size_t bytes = row_bytes_of(buffer.width, buffer.rounded);
        Place* found = nullptr;
        for (Place& place : places_)
            if (place.domain == buffer.domain && place.free_from <= buffer.first &&
                (found == nullptr || place.row_bytes > found->row_bytes))
                found = &place;
        if (found == nullptr) {
            places_.push_back({buffer.domain, 0, 0, {}});
            found = &places_.back();
        }
        found->row_bytes = std::max(found->row_bytes, (bytes + 63) / 64 * 64);
        found->free_from = until + 1;
        buffer.place = static_cast<int>(found - places_.data());
    }
}

void Program::reserve(const Step& step) {
    for (Domain domain : {ALL, WANTED}) {
        const int rows = capacity_for(step.rows(domain));
        if (rows <= capacity_[domain]) continue;
        for (Place& place : places_)
            if (place.domain == domain)
                place.memory = std::make_shared<Bytes>(place.row_bytes * size_t(rows));
        capacity_[domain] = rows;
    }
}

size_t Program::scratch_bytes(int rows, int wanted) const {
    size_t total = 0;
    for (const Place& place : places_)
        total += place.row_bytes * size_t(capacity_for(place.domain == ALL ? rows : wanted));
    return total;
}

// ---- running ---------------------------------------------------------------------------------

void Program::run(Step& step) {
    step.positions.clear();
    step.row_span.clear();
    for (size_t s = 0; s < step.spans.size(); ++s)
        for (int i = 0; i < step.spans[s].count; ++i) {
            step.positions.push_back(step.spans[s].start + i);
            step.row_span.push_back(static_cast<int32_t>(s));
        }
    reserve(step);
    step.adapted = std::any_of(step.spans.begin(), step.spans.end(),
                               [](const Span& span) { return span.adapter >= 0; });
    for (size_t i = 0; i < ops_.size(); ++i) taken_[i].store(0, std::memory_order_relaxed);
    pool_.run([&](int thread) { execute(step, thread); });
}

std::vector<Program::Output> Program::outputs(const Step& step) const {
    std::vector<Output> all;
    for (int b : outputs_)
        all.push_back({floats(b, step, 0), step.rows(buffers_[b].domain), buffers_[b].width,
                       places_[buffers_[b].place].memory});
    return all;
}

void Program::execute(const Step& step, int thread) {
    const int threads = pool_.threads();
    for (size_t i = 0; i < ops_.size(); ++i) {
        const Op& o = ops_[i];
        if (is_split(o.kind)) {
            if (adapts(o, step)) {
                enter_updates(o, step, thread);
                pool_.barrier();
            }
            split_op(o, i, step, thread);
            pool_.barrier();
            continue;
        }
        const int rows = step.rows(o.domain);
        if (replicated(o.domain, step)) {
            row_op(o, step, thread, 0, rows);
            continue;
        }
        const int first = rows * thread / threads, last = rows * (thread + 1) / threads;
        row_op(o, step, thread, first, last - first);
        pool_.barrier();
    }
}

// Buffers that row ops fill have OWN_ROWS rows for each thread when there are few rows.
uint8_t* Program::base(int b, const Step& step, int thread) const {
    const Buffer& buffer = buffers_[b];
    const bool own = buffer.own && replicated(buffer.domain, step);
    const size_t bytes = row_bytes_of(buffer.width, buffer.rounded);
    return places_[buffer.place].memory->data() + (own ? bytes * OWN_ROWS * size_t(thread) : 0);
}

float* Program::floats(int b, const Step& step, int thread) const {
    return reinterpret_cast<float*>(base(b, step, thread));
}

Rounded Program::ints(int b, const Step& step, int thread) const {
    return {reinterpret_cast<RoundedBlock*>(base(b, step, thread)), buffers_[b].width};
}

void Program::row_op(const Op& o, const Step& step, int thread, int row, int rows) {
    const int width = buffers_[o.out].width;
    const auto at = [&](int b, int r) {
        return floats(b, step, thread) + size_t(r) * buffers_[b].width;
    };
    if (o.kind == Kind::ROUND) {
        const Rounded out = ints(o.out, step, thread);
        return kernels_.round(floats(o.in[0], step, thread), rows, out, row);
    }
    for (int r = row; r < row + rows; ++r) {
        float* y = at(o.out, r);
        switch (o.kind) {
            case Kind::EMBED:
                kernels_.embed(*o.parts[0].weight, step.token_ids[r], o.scale, y);
                break;
            case Kind::GIVEN:
                std::memcpy(y, step.given + size_t(r) * width, size_t(width) * 4);
                break;
            case Kind::CONCAT: {
                const int first = buffers_[o.in[0]].width;
                std::memcpy(y, at(o.in[0], r), size_t(first) * 4);
                std::memcpy(y + first, at(o.in[1], r), size_t(width - first) * 4);
                break;
            }
            case Kind::NORM: kernels_.rms_norm(at(o.in[0], r), o.a, width, o.eps, y); break;
            case Kind::RESIDUAL:
                kernels_.residual(at(o.in[0], r), at(o.in[1], r), o.a, o.eps, o.b, width, y);
                break;
            case Kind::ROUTE: route(o.mixture, at(o.in[0], r), y); break;
            case Kind::PER_LAYER_INPUTS: {
                const float *tokens = at(o.in[0], r), *context = at(o.in[1], r);
                for (int i = 0; i < width; ++i) y[i] = context[i] * o.scale;
                for (int i = 0; i < width; i += o.width)
                    kernels_.rms_norm(y + i, o.a, o.width, o.eps, y + i);
                for (int i = 0; i < width; ++i) y[i] = (tokens[i] + y[i]) * float(M_SQRT1_2);
                break;
            }
            case Kind::GATE_BY:
                kernels_.gate_by(at(o.in[0], r), at(o.in[1], r) + o.first, width, o.activation, y);
                break;
            case Kind::SELECT:
                std::memcpy(y, at(o.in[0], step.wanted[r]), size_t(width) * 4);
                break;
            default: {  // ROPE_TABLE: cosines, then sines
                rotation(o.frequencies, step.positions[r] + o.first, y, y + width / 2);
            }
        }
    }
}

// Large pieces first, for streams that run on; small ones at the end, so that no thread waits long.
bool Program::take(size_t index, int total, int least, int& first, int& last) {
    first = taken_[index].load(std::memory_order_relaxed);
    while (first < total) {
        const int piece = std::max(least, (total - first) / (2 * pool_.threads()));
        last = std::min(first + piece, total);
        if (taken_[index].compare_exchange_weak(first, last, std::memory_order_relaxed))
            return true;
    }
    return false;
}

void Program::split_op(const Op& o, size_t index, const Step& step, int thread) {
    switch (o.kind) {
        case Kind::ROPE: return rope(o, index, step, thread);
        case Kind::EXPERTS_IN: return experts_in(o, index, step, thread);
        case Kind::EXPERTS_OUT: return experts_out(o, index, step, thread);
        case Kind::CLUSTERS: return clusters(o, index, step, thread);
        case Kind::ATTEND: return attention(o, index, step, thread);
        case Kind::SOFTCAP: {
            float* x = floats(o.in[0], step, thread);
            const size_t total = size_t(step.rows(o.domain)) * buffers_[o.in[0]].width;
            const size_t units = (total + 1023) / 1024;
            int first, last;
            while (take(index, static_cast<int>(units), 8, first, last)) {
                const size_t from = size_t(first) * 1024;
                const size_t to = std::min(total, size_t(last) * 1024);
                kernels_.softcap(x + from, static_cast<int>(to - from), o.scale);
            }
            return;
        }
        default: return products(o, index, step, thread);
    }
}

void Program::products(const Op& o, size_t index, const Step& step, int thread) {
    const bool joined = o.kind == Kind::GATED;
    int total = 0;
    for (const Part& part : o.parts) total += part.weight->groups();
    int first, last;
    while (take(index, joined ? total / 2 : total, 1, first, last)) {
        if (joined) {
            gated_products(o, first, last, step, thread);
            continue;
        }
        int before = 0;
        for (const Part& part : o.parts) {
            const int groups = part.weight->groups();
            const int from = std::max(first - before, 0), to = std::min(last - before, groups);
            if (from < to) product(o, part, from, to, step, thread);
            before += groups;
        }
    }
}

void Program::product(const Op& o, const Part& part, int first, int last, const Step& step,
                      int thread) {
    Rounded q{};
    if (o.in[1] >= 0) q = ints(o.in[1], step, thread);
    kernels_.linear(*part.weight, first, last, floats(o.in[0], step, thread),
                    o.in[1] >= 0 ? &q : nullptr, 0, step.rows(o.domain), part.bias,
                    floats(part.out, step, thread), buffers_[part.out].width);
    if (step.adapted) add_updates(part, first, last, step, thread);
}

// With adapters the two products are made one by one, since what is added comes before the
// activation; the bits of a row without are the same.
void Program::gated_products(const Op& o, int first, int last, const Step& step, int thread) {
    const Part &gate = o.parts[0], &up = o.parts[1];
    const int rows = step.rows(o.domain), width = buffers_[gate.out].width;
    float* y = floats(gate.out, step, thread);
    if (!adapts(o, step)) {
        Rounded q{};
        if (o.in[1] >= 0) q = ints(o.in[1], step, thread);
        return kernels_.gated(*gate.weight, *up.weight, first, last,
                              floats(o.in[0], step, thread), o.in[1] >= 0 ? &q : nullptr, 0, rows,
                              gate.bias, up.bias, o.activation, y, width);
    }
    product(o, gate, first, last, step, thread);
    product(o, up, first, last, step, thread);
    const float* by = floats(up.out, step, thread);
    const int from = first * GROUP, to = std::min(last * GROUP, width);
    for (int r = 0; r < rows; ++r) {
        const size_t at = size_t(r) * width + from;
        kernels_.gate_by(y + at, by + at, to - from, o.activation, y + at);
    }
}

// ---- adapters --------------------------------------------------------------------------------

bool Program::adapts(const Op& o, const Step& step) {
    return step.adapted && std::any_of(o.parts.begin(), o.parts.end(),
                                       [](const Part& part) { return part.inner >= 0; });
}

const LowRank* Program::update_of(const Part& part, const Span& span) {
    if (span.adapter < 0 || part.updates.empty()) return nullptr;
    const LowRank& update = part.updates[span.adapter];
    return update.a == nullptr ? nullptr : &update;
}

// Where the rows of a span, `rank` numbers each, are counted from: every span has room for the
// largest rank.
float* Program::inner(const Part& part, const Span& span, int rank, const Step& step,
                      int thread) const {
    const int width = buffers_[part.inner].width;
    return floats(part.inner, step, thread) + size_t(span.row) * (width - rank);
}

void Program::enter_updates(const Op& o, const Step& step, int thread) {
    const float* x = floats(o.in[0], step, thread);
    int unit = 0;
    for (const Part& part : o.parts)
        for (const Span& span : step.spans) {
            const LowRank* update = update_of(part, span);
            if (update == nullptr) continue;
            const Weight& a = *update->a;
            float* y = inner(part, span, a.rows, step, thread);
            for (int row = 0; row < span.count; row += TILE_ROWS)
                for (int g = 0; g < a.groups(); ++g)
                    if (unit++ % pool_.threads() == thread)
                        kernels_.linear(a, g, g + 1, x, nullptr, span.row + row,
                                        std::min(TILE_ROWS, span.count - row), nullptr, y, a.rows);
        }
}

void Program::add_updates(const Part& part, int first, int last, const Step& step, int thread) {
    for (const Span& span : step.spans) {
        const LowRank* update = update_of(part, span);
        if (update == nullptr) continue;
        const Weight& b = *update->b;
        kernels_.add_scaled(b, first, last, inner(part, span, b.cols, step, thread), span.row,
                            span.count, update->scale, floats(part.out, step, thread), b.rows);
    }
}

// ---- positions -------------------------------------------------------------------------------

void Program::rope(const Op& o, size_t index, const Step& step, int thread) {
    const Attention& a = o.attention;
    const bool stores = o.kv != nullptr;
    const int dim = a.dim, half = dim / 2, units = a.heads + (stores ? a.kv_heads : 0);
    float* q = floats(o.in[0], step, thread);
    const float* k = stores ? floats(o.in[1], step, thread) : nullptr;
    const float* v = stores ? floats(o.in[2], step, thread) : nullptr;
    const float* table = floats(o.in[3], step, thread);
    float key[LARGEST_DIM], value[LARGEST_DIM];
    int first, last;
    const int total = step.rows(ALL) * units;
    while (take(index, total, 1, first, last)) {
        for (int u = first; u < last; ++u) {
            const int row = u / units, head = u % units;
            const float* cos = table + size_t(row) * dim;
            if (head < a.heads) {
                float* at = q + (size_t(row) * a.heads + head) * dim;
                kernels_.rotate(at, o.a, dim, a.eps, cos, cos + half);
                continue;
            }
            const int g = head - a.heads;
            const size_t at = (size_t(row) * a.kv_heads + g) * dim;
            std::memcpy(key, k + at, size_t(dim) * 4);
            std::memcpy(value, v + at, size_t(dim) * 4);
            if (o.kv->keys != nullptr)
                kernels_.rotate(key, o.b, dim, a.eps, cos, cos + half);
            if (a.value_norm) kernels_.rms_norm(value, nullptr, dim, a.eps, value);
            const Span& span = step.spans[step.row_span[row]];
            const int p = step.positions[row], stride = o.kv->stride;
            const size_t cell = o.kv->sliding
                                    ? size_t(span.ring) * stride + p % stride
                                    : size_t(span.pages[p / stride]) * stride + p % stride;
            kernels_.store(*o.kv, cell, g, key, value);
        }
    }
}

// A unit is 16 inner numbers of one expert, for all rows that go through it.
void Program::experts_in(const Op& o, size_t index, const Step& step, int thread) {
    const Mixture& m = o.mixture;
    const int rows = step.rows(ALL), groups = m.width / GROUP;
    const float* x = floats(o.in[0], step, thread);
    Rounded q{};
    if (o.in[1] >= 0) q = ints(o.in[1], step, thread);
    const float* chosen = floats(o.in[2], step, thread);
    float* inner = floats(o.out, step, thread);
    std::vector<std::vector<std::pair<int, int>>> takers(m.experts);  // of each: (row, place)
    std::vector<int> busy;
    for (int r = 0; r < rows; ++r)
        for (int k = 0; k < m.used; ++k) {
            const int e = static_cast<int>(chosen[size_t(r) * 2 * m.used + k]);
            if (takers[e].empty()) busy.push_back(e);
            takers[e].push_back({r, k});
        }
    int first, last;
    const int total = static_cast<int>(busy.size()) * groups;
    while (take(index, total, std::max(1, groups / 4), first, last)) {
        for (int unit = first; unit < last; ++unit) {
            const int e = busy[unit / groups], g = unit % groups;
            const Weight gate = part_of(*m.gate_up, 2 * e * m.width, m.width);
            const Weight up = part_of(*m.gate_up, (2 * e + 1) * m.width, m.width);
            for (const auto& [r, k] : takers[e])
                kernels_.gated(gate, up, g, g + 1, x, o.in[1] >= 0 ? &q : nullptr, r, 1, nullptr,
                               nullptr, o.activation,
                               inner + (ptrdiff_t(r) * m.used + k - r) * m.width, m.width);
        }
    }
}

// A unit is 16 outputs of all rows. The activations are [row * used, width].
void Program::experts_out(const Op& o, size_t index, const Step& step, int thread) {
    const Mixture& m = o.mixture;
    const int rows = step.rows(ALL), hidden = buffers_[o.out].width;
    const float* inner = floats(o.in[0], step, thread);
    Rounded q{};
    if (o.in[1] >= 0) q = ints(o.in[1], step, thread);
    const float* chosen = floats(o.in[2], step, thread);
    float* out = floats(o.out, step, thread);
    int first, last;
    while (take(index, hidden / GROUP, 1, first, last)) {
        for (int g = first; g < last; ++g)
            for (int r = 0; r < rows; ++r) {
                const float* mine = chosen + size_t(r) * 2 * m.used;
                float sum[GROUP] = {}, term[GROUP];
                for (int k = 0; k < m.used; ++k) {
                    const int e = static_cast<int>(mine[k]);
                    const Weight down = part_of(*m.down, e * hidden, hidden);
                    kernels_.linear(down, g, g + 1, inner, o.in[1] >= 0 ? &q : nullptr,
                                    r * m.used + k, 1, nullptr, term - g * GROUP, 0);
                    for (int i = 0; i < GROUP; ++i) sum[i] += mine[m.used + k] * term[i];
                }
                std::memcpy(out + size_t(r) * hidden + g * GROUP, sum, sizeof sum);
            }
    }
}

// A unit is one cluster, for all rows.
void Program::clusters(const Op& o, size_t index, const Step& step, int thread) {
    const Mixture& m = o.mixture;
    const Weight& head = *m.gate_up;
    const float* x = floats(o.in[0], step, thread);
    Rounded q{};
    if (o.in[1] >= 0) q = ints(o.in[1], step, thread);
    const float* chosen = floats(o.in[2], step, thread);
    float* out = floats(o.out, step, thread);
    int first, last;
    while (take(index, m.experts, 16, first, last))
        for (int c = first; c < last; ++c)
            for (int r = 0; r < step.rows(ALL); ++r) {
                const float* mine = chosen + size_t(r) * 2 * m.used;
                float* y = out + size_t(r) * head.rows + size_t(c) * m.width;
                if (std::binary_search(mine, mine + m.used, static_cast<float>(c)))
                    kernels_.linear(part_of(head, c * m.width, m.width), 0, m.width / GROUP, x,
                                    o.in[1] >= 0 ? &q : nullptr, r, 1, nullptr, y, 0);
                else
                    std::fill(y, y + m.width, -std::numeric_limits<float>::infinity());
            }
}

void Program::attention(const Op& o, size_t index, const Step& step, int thread) {
    const Attention& a = o.attention;
    const Units units(a);
    const float* q = floats(o.in[0], step, thread);
    float* out = floats(o.out, step, thread);
    int total = 0;
    for (const Span& span : step.spans)
        total += units.of(span);
    int first, last;
    while (take(index, total, 1, first, last))
        for (int unit = first; unit < last; ++unit) attend_unit(o, step, unit, q, out);
}

void Program::attend_unit(const Op& o, const Step& step, int unit, const float* q, float* out) {
    const Attention& a = o.attention;
    const auto [group, heads, rows, parts, kv_heads] = Units(a);
    const int dim = a.dim;
    const Span* span = step.spans.data();
    for (const Units units(a); unit >= units.of(*span); ++span) unit -= units.of(*span);
    const int part = unit % parts, kv_head = unit / parts % kv_heads;
    const int from = unit / parts / kv_heads * rows;
    const int to = std::min(from + rows, span->count);
    int positions[QUERIES], count = 0;
    const float* queries[QUERIES];
    float* outs[QUERIES];
    for (int i = from; i < to; ++i)
        for (int h = part * heads; h < std::min(group, (part + 1) * heads); ++h) {
            const size_t at = (size_t(span->row + i) * a.heads + kv_head * group + h) * dim;
            positions[count] = span->start + i;
            queries[count] = q + at;
            outs[count++] = out + at;
        }
    kernels_.attend(*o.kv, a, *span, kv_head, count, positions, queries, outs);
}

}  // namespace hb
