// halfbyte._cpu: packed weights, caches and recorded steps, for Python.
//
// Shapes are checked here, before any kernel runs; a wrong one raises ValueError. Objects that a
// program points into are kept alive by it.

#include <cpuid.h>
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <stdexcept>

#include "program.h"
#include "rotation.h"
#include "weight.h"

namespace nb = nanobind;
using namespace hb;

namespace {

using Array8 = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Array32 = nb::ndarray<const int32_t, nb::c_contig, nb::device::cpu>;
using ArrayF = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using RowsF = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

constexpr int MOST_THREADS = 1024, MOST_HEADS = 1 << 16;
constexpr size_t MOST_CELLS = size_t(1) << 30;  // positions are 32 bits

void require(bool good, const char* what) {
    if (!good) throw std::invalid_argument(what);
}

// Numpy makes arrays that do not lie at a multiple of their elements' size.
template <typename... Kind> const auto* data_of(const nb::ndarray<Kind...>& array) {
    const auto* data = array.data();
    require(reinterpret_cast<uintptr_t>(data) % sizeof(*data) == 0, "an array is not aligned");
    return data;
}

Activation activation_of(int number) {
    require(0 <= number && number <= int(Activation::GELU_TANH), "an unknown activation");
    return Activation(number);
}

bool has_avx_vnni() {
#if defined(HALFBYTE_EVEX_VNNI)
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl");
#else
    unsigned eax, ebx, ecx, edx;  // __builtin_cpu_supports does not know it everywhere
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
#endif
}

// What an instruction set's kernels need and this processor has not; of an unknown set, its name.
std::vector<std::string> lacking(const std::string& isa) {
    std::vector<std::string> names;
    const auto need = [&](const char* name, bool here) {
        if (!here) names.emplace_back(name);
    };
    need("avx2", __builtin_cpu_supports("avx2"));
    need("fma", __builtin_cpu_supports("fma"));
    need("f16c", __builtin_cpu_supports("f16c"));
    if (isa == "avx512-vnni") {
        need("avx512vnni", __builtin_cpu_supports("avx512vnni"));
        need("avx512bw", __builtin_cpu_supports("avx512bw"));
        need("avx512vl", __builtin_cpu_supports("avx512vl"));
        need("avx512dq", __builtin_cpu_supports("avx512dq"));
    } else if (isa == "avx-vnni") {
        need("avx_vnni", has_avx_vnni());
    } else if (isa != "avx2") {
        names = {isa};
    }
    return names;
}

bool supports(const std::string& isa) { return lacking(isa).empty(); }

const Kernels& kernels_of(const std::string& isa) {
    require(supports(isa), "this processor does not have that instruction set");
    if (isa == "avx512-vnni") return kernels_avx512();
    return isa == "avx-vnni" ? kernels_avxvnni() : kernels_avx2();
}

// Bytes per second that all threads together read from memory: the best of several passes.
double read_bandwidth(Pool& pool, const std::string& isa, size_t bytes) {
    const Kernels& kernels = kernels_of(isa);
    const size_t each = bytes / size_t(pool.threads()) / 256 * 256;
    require(each > 0, "too few bytes");
    const Bytes memory(each * size_t(pool.threads()));
    std::memset(memory.data(), 1, memory.size());
    double best = 0;
    std::atomic<float> sink{0};
    const nb::gil_scoped_release nogil;
    for (int pass = 0; pass < 7; ++pass) {
        const auto start = std::chrono::steady_clock::now();
        pool.run([&](int thread) {
            sink = kernels.read(memory.data() + each * size_t(thread), each);
        });
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        best = std::max(best, double(memory.size()) / seconds.count());
    }
    return best;
}

class PackedWeight {
public:
    // An outline: the shape of a weight that is not there. It can be recorded, not run.
    PackedWeight(Pool& pool, int number, int rows, int cols) : pool_(pool) {
        require(0 <= number && number <= int(Scheme::Q6_K), "an unknown scheme");
        require(rows > 0 && cols > 0, "a weight has rows and columns");
        const auto scheme = Scheme(number);
        require(cols % block_of(scheme) == 0, "the columns are not whole blocks");
        weight_ = {scheme, rows, cols, group_bytes(scheme, cols), nullptr};
    }

    PackedWeight(Pool& pool, int number, int rows, int cols, Array8 stored)
        : PackedWeight(pool, number, rows, cols) {
        require(stored.shape(0) == size_t(rows) &&
                    stored.shape(1) == row_bytes(weight_.scheme, cols),
                "the bytes do not have the size of the shape");
        memory_ = Bytes(nbytes(), Pages::LARGE_LATER);
        weight_.data = memory_.data();
        const uint8_t* data = stored.data();
        const nb::gil_scoped_release nogil;
        const size_t bytes = weight_.group_bytes;
        const int ahead = int(POPULATED / bytes) + 1;
        over_groups([&](int g, int first) {
            if ((g - first) % ahead == 0)
                memory_.populate(bytes * size_t(g), bytes * size_t(g + ahead));
            pack_group(weight_, data, g);
            if (!is_finite(weight_, g)) finite_.store(false, std::memory_order_relaxed);
        });
    }

    nb::ndarray<nb::numpy, uint8_t, nb::ndim<2>> unpack() const {
        require(weight_.data != nullptr, "an outline has no bytes");
        const size_t bytes = row_bytes(weight_.scheme, weight_.cols);
        auto* data = new uint8_t[bytes * size_t(weight_.rows)]();
        nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<uint8_t*>(p); });
        {
            const nb::gil_scoped_release nogil;
            over_groups([&](int g, int) { unpack_group(weight_, data, g); });
        }
        return {data, {size_t(weight_.rows), bytes}, owner};
    }

    const Weight& weight() const { return weight_; }
    const Bytes& memory() const { return memory_; }
    size_t nbytes() const { return weight_.group_bytes * size_t(weight_.groups()); }
    bool finite() const { return finite_.load(); }

private:
    static constexpr size_t POPULATED = size_t(1) << 18;  // bytes that stay in cache until packed
    template <typename Each> void over_groups(Each each) const {
        const int groups = weight_.groups(), threads = pool_.threads();
        pool_.run([&](int thread) {
            const int first = int(int64_t(groups) * thread / threads);
            const int last = int(int64_t(groups) * (thread + 1) / threads);
            for (int g = first; g < last; ++g) each(g, first);
        });
    }
    Weight weight_{};
    Bytes memory_;
    std::atomic<bool> finite_{true};
    Pool& pool_;
};

// Collapses the weights' memory into large pages, beside whatever runs.
void settle(Pool& pool, const std::vector<const PackedWeight*>& weights) {
    std::vector<std::pair<uint8_t*, size_t>> ranges;
    for (const PackedWeight* weight : weights) {
        require(weight != nullptr, "a weight that is not there");
        ranges.emplace_back(weight->memory().data(), weight->memory().size());
    }
    pool.beside([ranges](const Pool::Ending& ending) {
        for (const auto& [data, size] : ranges) collapse(data, size, ending);
    });
}

class Vector {
public:
    explicit Vector(ArrayF values) : values_(data_of(values), data_of(values) + values.size()) {
        require(!values_.empty(), "a vector has elements");
    }
    const float* data() const { return values_.data(); }
    size_t size() const { return values_.size(); }

private:
    std::vector<float> values_;
};

class Cells {
public:
    // With `rotations` they are of values only; keys are made of those, `key_norm` and the rotations.
    Cells(int heads, int dim, size_t cells, int stride, bool sliding, int kind,
          const Vector* key_norm, const Rotations* rotations) {
        require(0 < heads && heads <= MOST_HEADS && dim > 0 && dim % 2 == 0 && dim <= LARGEST_DIM,
                "heads, an even dim");
        require(0 <= kind && kind <= int(Cell::Q8_0), "an unknown kind of cells");
        const bool integers = Cell(kind) == Cell::Q8_0;
        require(!integers || dim % BLOCK == 0, "q8_0 needs a dim that is a multiple of 32");
        require(stride > 0 && stride % KEY_TILE == 0 && 0 < cells && cells <= MOST_CELLS &&
                    cells % size_t(stride) == 0,
                "cells come in strides that are a multiple of 64");
        const size_t each = integers ? 1 : Cell(kind) == Cell::F32 ? 4 : 2;
        const size_t padded = size_t(dim + GROUP - 1) / GROUP * GROUP;
        if (rotations == nullptr) keys_ = Bytes(size_t(heads) * cells * size_t(dim) * each);
        values_ = Bytes(size_t(heads) * cells * padded * each);
        if (integers) {
            key_scales_ = Bytes(size_t(heads) * cells * size_t(dim / BLOCK) * 4);
            value_scales_ = Bytes(key_scales_.size());
        }
        kv_ = {heads, dim, stride, sliding, Cell(kind), cells, keys_.data(), values_.data(),
               key_scales_.as<float>(), value_scales_.as<float>(), {}};
        if (rotations == nullptr) return;
        require(!integers && !sliding && rotations->dim() == dim &&
                    rotations->positions() >= cells && key_norm != nullptr &&
                    key_norm->size() == size_t(dim),
                "keys cannot be made of these values");
        kv_.turns = rotations->turns(key_norm->data());
        positions_ = rotations->positions();
    }
    const KV& kv() const { return kv_; }
    // Makes all of it resident, with zeros.
    void seed() {
        for (Bytes* bytes : {&keys_, &values_, &key_scales_, &value_scales_})
            if (bytes->size() > 0) std::memset(bytes->data(), 0, bytes->size());
    }
    // What the cells of one ring hold, into another ring.
    void copy_ring(int from, int to) {
        const int rings = int(kv_.cells / size_t(kv_.stride));
        require(kv_.sliding && 0 <= from && from < rings && 0 <= to && to < rings, "no such ring");
        for (Bytes* bytes : {&keys_, &values_, &key_scales_, &value_scales_}) {
            const size_t ring = bytes->size() / size_t(kv_.heads) / size_t(rings);
            for (int head = 0; head < kv_.heads && ring > 0; ++head) {
                auto* cells = static_cast<uint8_t*>(bytes->data()) + ring * size_t(rings) * size_t(head);
                std::memmove(cells + ring * size_t(to), cells + ring * size_t(from), ring);
            }
        }
    }
    size_t positions() const { return positions_; }
    size_t nbytes() const {
        return keys_.size() + values_.size() + key_scales_.size() + value_scales_.size();
    }

private:
    KV kv_{};
    Bytes keys_, values_, key_scales_, value_scales_;
    size_t positions_ = MOST_CELLS;
};

Attention attention_of(int heads, int kv_heads, int dim, int window, float scale, float eps,
                       bool value_norm, int ahead) {
    require(0 < kv_heads && kv_heads <= heads && heads <= MOST_HEADS && heads % kv_heads == 0,
            "key/value heads divide the heads");
    require(0 < dim && dim <= LARGEST_DIM && dim % 2 == 0, "an even dim");
    require(window >= 0 && 0 <= ahead && size_t(ahead) < MOST_CELLS, "a window and a distance are not negative");
    return {heads, kv_heads, dim, window, scale, eps, value_norm, ahead};
}

const float* data_of(const Vector* v, int width) {
    if (v == nullptr) return nullptr;
    require(v->size() == size_t(width), "a vector does not have the width of its rows");
    return v->data();
}

// What an adapter adds to a linear; null weights where that is nothing.
class Update {
public:
    Update(const PackedWeight& a, const PackedWeight& b, float scale)
        : update_{&a.weight(), &b.weight(), scale} {
        require(a.weight().rows == b.weight().cols, "the two halves of an update do not fit");
        require(!takes_integers(a.weight().scheme) && !takes_integers(b.weight().scheme),
                "an update is not of floats");
    }
    const LowRank& update() const { return update_; }

private:
    LowRank update_;
};

using Updates = std::vector<const Update*>;

// What recording knows of a buffer; one of width 0 is filled by nothing.
struct Made {
    int width = 0;
    bool selected = false;  // its rows are those of `select`
    bool product = false;   // there is one for all threads, which can be changed in place
};

class Recorder {
public:
    Recorder(Pool& pool, const std::string& isa) : program_(kernels_of(isa), pool) {}

    int embed(const PackedWeight& table, float scale) {
        begin();
        note(table.weight());
        vocab_ = vocab_ == 0 ? table.weight().rows : std::min(vocab_, table.weight().rows);
        return made(program_.embed(&table.weight(), scale), {table.weight().cols});
    }
    int given(int width) {
        begin();
        require(width > 0 && given_ == 0, "states are given once, and have a width");
        given_ = width;
        return made(program_.given(width), {width});
    }
    int concat(int x, int y) {
        const Made a = whole(x), b = whole(y);
        return made(program_.concat(x, y), {a.width + b.width});
    }
    int rms_norm(int x, const Vector* weight, float eps) {
        const Made from = known(x);
        return made(program_.rms_norm(x, data_of(weight, from.width), eps),
                    {from.width, from.selected});
    }
    int linear(int x, const PackedWeight& w, const Vector* bias, const Updates& updates) {
        const Made from = known(x);
        require(w.weight().cols == from.width, "the product does not fit its input");
        return made(program_.linear(x, product(w, bias, updates)),
                    {w.weight().rows, from.selected, true});
    }
    int gated(int x, const PackedWeight& gate, const Vector* gate_bias, const Updates& gate_updates,
              const PackedWeight& up, const Vector* up_bias, const Updates& up_updates,
              int activation) {
        const Made from = known(x);
        const Weight &a = gate.weight(), &b = up.weight();
        require(a.cols == from.width && b.cols == a.cols && a.rows == b.rows &&
                    a.scheme == b.scheme,
                "gate and up are not alike");
        return made(program_.gated(x, product(gate, gate_bias, gate_updates),
                                   product(up, up_bias, up_updates), activation_of(activation)),
                    {a.rows, from.selected, true});
    }
    int rope_and_store(int q, int k, int v, const Vector* q_norm, const Vector* k_norm,
                       const Attention& a, const std::vector<float>& frequencies, Cells& cells) {
        require(queries(q, a) && q != k && q != v && whole(k).width == a.kv_heads * a.dim &&
                    whole(v).width == a.kv_heads * a.dim && frequencies.size() * 2 == size_t(a.dim),
                "the projections do not fit the attention");
        uses(cells, a);
        program_.rope_and_store(q, k, v, data_of(q_norm, a.dim), data_of(k_norm, a.dim), a,
                                frequencies, &cells.kv());
        return q;
    }
    int rope(int q, const Vector* q_norm, const Attention& a,
             const std::vector<float>& frequencies) {
        require(queries(q, a) && frequencies.size() * 2 == size_t(a.dim),
                "the queries do not fit the attention");
        program_.rope(q, data_of(q_norm, a.dim), a, frequencies);
        return q;
    }
    int attend(int q, const Attention& a, Cells& cells) {
        require(queries(q, a), "the queries do not fit the attention");
        uses(cells, a);
        return made(program_.attend(q, a, &cells.kv()), {a.heads * a.dim, false, true});
    }
    int route_experts(int x, int scores, const PackedWeight& gate_up, const PackedWeight& down,
                      const Vector& scale, int used, float score_scale, int activation) {
        const Weight &in = gate_up.weight(), &out = down.weight();
        const int64_t experts = int64_t(scale.size()), inner = out.cols, hidden = whole(x).width;
        require(0 < used && used <= experts && whole(scores).width == experts &&
                    inner % GROUP == 0 && hidden % GROUP == 0 && in.cols == hidden &&
                    in.rows == experts * 2 * inner && out.rows == experts * hidden,
                "the experts do not fit");
        note(in);
        note(out);
        const Mixture mixture{&in, &out, scale.data(), int(experts), used, out.cols, score_scale};
        return made(program_.route_experts(x, scores, mixture, activation_of(activation)),
                    {int(hidden), false, true});
    }
    int per_layer_inputs(int tokens, int context, const Vector& norm, float eps, float scale) {
        const int width = whole(tokens).width, own = int(norm.size());
        require(whole(context).width == width && width % own == 0,
                "the embeddings per layer do not fit");
        return made(program_.per_layer_inputs(tokens, context, norm.data(), own, eps, scale),
                    {width});
    }
    int gate_by(int gate, int inputs, int first, int activation) {
        const int width = whole(gate).width;
        require(0 <= first && first <= whole(inputs).width - width, "the gate does not fit");
        return made(program_.gate_by(gate, inputs, first, activation_of(activation)), {width});
    }
    int residual(int x, int update, const Vector* norm, float eps, const Vector* scalar) {
        const Made a = known(x), b = known(update);
        require(a.width == b.width && a.selected == b.selected, "the residual does not fit");
        return made(program_.residual(x, update, data_of(norm, a.width), eps, data_of(scalar, 1)),
                    {a.width, a.selected});
    }
    int select(int x) {
        const int width = whole(x).width;
        return made(program_.select(x), {width, true});
    }
    int clusters(int x, int scores, const PackedWeight& head, int used) {
        const Weight& w = head.weight();
        const int count = whole(scores).width;
        require(0 < used && used <= count && w.rows % count == 0 &&
                    w.rows / count % GROUP == 0 && w.cols == whole(x).width,
                "the clusters do not fit");
        note(w);
        return made(program_.clusters(x, scores, &w, count, used), {w.rows, false, true});
    }
    void finish(const std::vector<int>& outputs, float softcap) {
        require(!outputs.empty(), "nothing comes out");
        for (int output : outputs) (void)known(output);
        require(softcap == 0 || known(outputs[0]).product, "only a product can be capped");
        program_.finish(outputs, softcap);
        finished_ = true;
    }

    // spans: [n, 6] of start, count, ring, adapter or -1, first page in `pages`, number of pages.
    // The arrays returned are views of the program's memory, which they keep.
    using View = nb::ndarray<nb::numpy, const float, nb::ndim<2>>;
    std::vector<View> run(Array32 token_ids, Array32 spans, Array32 pages, Array32 wanted,
                          RowsF given) {
        require(!outline_, "an outline can be recorded, not run");
        require(finished_, "the program is not finished");
        if (running_) throw std::runtime_error("the program is already running, in another thread");
        const size_t rows = token_ids.size();
        step_.token_ids.assign(data_of(token_ids), data_of(token_ids) + rows);
        step_.wanted.assign(data_of(wanted), data_of(wanted) + wanted.size());
        for (int32_t id : step_.token_ids) require(0 <= id && id < vocab_, "an unknown token id");
        for (int32_t row : step_.wanted)
            require(0 <= row && size_t(row) < rows, "a wanted row that is not there");
        read_spans(spans, pages, rows);
        require(given_ == 0 || (given.shape(0) == rows && given.shape(1) == size_t(given_)),
                "the states given do not fit the rows");
        step_.given = data_of(given);
        run_step();
        std::vector<View> views;
        for (const auto& [values, count, width, memory] : program_.outputs(step_)) {
            const nb::capsule owner(new auto(memory), [](void* p) noexcept {
                delete static_cast<std::shared_ptr<const Bytes>*>(p);
            });
            views.emplace_back(values, std::initializer_list<size_t>{size_t(count), size_t(width)},
                               owner);
        }
        return views;
    }
    size_t scratch_bytes(int rows, int wanted) const {
        return program_.scratch_bytes(rows, wanted);
    }

private:
    void begin() const { require(!finished_, "a finished program records no more"); }
    int made(int buffer, Made made) {
        made_.resize(size_t(buffer) + 1);
        made_[size_t(buffer)] = made;
        return buffer;
    }
    Made known(int buffer) const {
        begin();
        require(0 <= buffer && size_t(buffer) < made_.size() && made_[size_t(buffer)].width > 0,
                "a buffer that nothing fills");
        return made_[size_t(buffer)];
    }
    Made whole(int buffer) const {
        require(!known(buffer).selected, "all rows are needed, not those selected");
        return known(buffer);
    }
    bool queries(int q, const Attention& a) const {
        return whole(q).product && known(q).width == a.heads * a.dim;
    }
    // The smallest cache of a kind says which pages and rings there are.
    void uses(const Cells& cells, const Attention& a) {
        const KV& kv = cells.kv();
        require(kv.heads == a.kv_heads && kv.dim == a.dim && kv.sliding == (a.window > 0),
                "the cells do not fit the attention");
        const size_t count = kv.cells / size_t(kv.stride);
        positions_ = std::min(positions_, cells.positions());
        if (kv.sliding) {
            require(a.window <= kv.stride, "the ring is too short");
            num_rings_ = std::min(num_rings_, count);
            rings_.push_back({a.window, kv.stride});
            return;
        }
        require(page_len_ == 0 || page_len_ == kv.stride, "pages of several lengths");
        page_len_ = kv.stride;
        num_pages_ = std::min(num_pages_, count);
    }
    void run_step() {
        struct Running {
            bool& flag;
            explicit Running(bool& flag) : flag(flag) { flag = true; }
            ~Running() { flag = false; }
        };
        const Running running(running_);
        const nb::gil_scoped_release nogil;
        program_.run(step_);
    }
    void note(const Weight& w) { outline_ |= w.data == nullptr; }
    Product product(const PackedWeight& w, const Vector* bias, const Updates& updates) {
        note(w.weight());
        Product product{&w.weight(), data_of(bias, w.weight().rows)};
        for (const Update* update : updates) {
            const LowRank added = update == nullptr ? LowRank{} : update->update();
            require(update == nullptr || (added.a->cols == w.weight().cols &&
                                          added.b->rows == w.weight().rows),
                    "an update does not fit its weight");
            if (update != nullptr) {
                note(*added.a);
                note(*added.b);
            }
            product.updates.push_back(added);
        }
        if (!updates.empty()) {
            require(adapters_ == 0 || adapters_ == updates.size(), "updates of other adapters");
            adapters_ = updates.size();
        }
        return product;
    }
    void read_spans(Array32 spans, Array32 pages, size_t rows) {
        require(spans.ndim() == 2 && spans.shape(1) == 6, "a span has six numbers");
        pages_.assign(data_of(pages), data_of(pages) + pages.size());
        for (int32_t page : pages_)
            require(page >= 0 && size_t(page) < num_pages_, "a page that is not there");
        step_.spans.clear();
        size_t row = 0;
        for (size_t s = 0; s < spans.shape(0); ++s) {
            const int32_t* f = data_of(spans) + 6 * s;
            const int32_t start = f[0], count = f[1], ring = f[2], adapter = f[3];
            const int32_t first_page = f[4], page_count = f[5];
            require(start >= 0 && count > 0 && ring >= 0 && first_page >= 0 && page_count >= 0 &&
                        size_t(first_page) + size_t(page_count) <= pages_.size(),
                    "a span outside of its pages");
            require(int64_t(start) + count <= int64_t(positions_), "a position beyond any");
            if (page_len_ > 0)
                require(int64_t(page_count) * page_len_ >= int64_t(start) + count,
                        "a span has too few pages");
            require(size_t(ring) < num_rings_, "a ring that is not there");
            for (const Ring& of : rings_)
                require(count <= of.stride - std::min(of.window - 1, start),
                        "a span is too long for its ring");
            require(adapter >= -1 && adapter < int(adapters_), "an adapter that is not there");
            step_.spans.push_back({int(row), start, count, ring, adapter,
                                   pages_.data() + first_page});
            row += size_t(count);
        }
        require(row == rows, "the spans do not cover the rows");
    }

    struct Ring {
        int window, stride;
    };

    Program program_;
    Step step_;
    std::vector<int32_t> pages_;
    std::vector<Made> made_;
    std::vector<Ring> rings_;
    int vocab_ = 0, page_len_ = 0, given_ = 0;
    size_t positions_ = MOST_CELLS, num_pages_ = MOST_CELLS, num_rings_ = MOST_CELLS;
    size_t adapters_ = 0;
    bool finished_ = false, running_ = false;
    bool outline_ = false;  // some weight is not there
};

}  // namespace

NB_MODULE(_cpu, m) {
    m.def("supports", &supports);
    m.def("lacking", &lacking);
    m.def("read_bandwidth", &read_bandwidth);
    m.def("settle", &settle);

    nb::class_<Pool>(m, "Pool")
        .def("__init__",
             [](Pool* pool, int threads) {
                 require(0 < threads && threads <= MOST_THREADS, "a pool of 1 to 1024 threads");
                 new (pool) Pool(threads);
             })
        .def_prop_ro("threads", &Pool::threads);

    nb::class_<PackedWeight>(m, "Weight")
        .def(nb::init<Pool&, int, int, int, Array8>(), nb::arg("pool"), nb::arg("scheme"),
             nb::arg("rows"), nb::arg("cols"), nb::arg("stored").noconvert(),
             nb::keep_alive<1, 2>())
        .def(nb::init<Pool&, int, int, int>(), nb::keep_alive<1, 2>())
        .def("unpack", &PackedWeight::unpack)
        .def_prop_ro("finite", &PackedWeight::finite)
        .def_prop_ro("nbytes", &PackedWeight::nbytes);

    nb::class_<Vector>(m, "Vector")
        .def(nb::init<ArrayF>(), nb::arg("values").noconvert())
        .def_prop_ro("nbytes", [](const Vector& v) { return v.size() * 4; });

    nb::class_<Rotations>(m, "Rotations")
        .def("__init__",
             [](Rotations* rotations, const std::vector<float>& frequencies, size_t positions) {
                 require(!frequencies.empty() && frequencies.size() % GROUP == 0 &&
                             frequencies.size() <= LARGEST_DIM / 2 && positions <= MOST_CELLS,
                         "pairs come in groups of 16");
                 new (rotations) Rotations(frequencies, positions);
             });

    nb::class_<Cells>(m, "Cells")
        .def(nb::init<int, int, size_t, int, bool, int, const Vector*, const Rotations*>(),
             nb::arg("heads"), nb::arg("dim"), nb::arg("cells"), nb::arg("stride"),
             nb::arg("sliding"), nb::arg("kind"), nb::arg("key_norm").none() = nb::none(),
             nb::arg("rotations").none() = nb::none(), nb::keep_alive<1, 8>(),
             nb::keep_alive<1, 9>())
        .def("seed", &Cells::seed)
        .def("copy_ring", &Cells::copy_ring, nb::arg("source"), nb::arg("target"),
             nb::call_guard<nb::gil_scoped_release>())
        .def_prop_ro("nbytes", &Cells::nbytes);

    nb::class_<Attention>(m, "Attention")
        .def("__init__", [](Attention* a, int heads, int kv_heads, int dim, int window, float scale,
                            float eps, bool value_norm, int ahead) {
            new (a) Attention(
                attention_of(heads, kv_heads, dim, window, scale, eps, value_norm, ahead));
        });

    nb::class_<Update>(m, "Update")
        .def(nb::init<const PackedWeight&, const PackedWeight&, float>(), nb::keep_alive<1, 2>(),
             nb::keep_alive<1, 3>());

    nb::class_<Recorder>(m, "Program")
        .def(nb::init<Pool&, const std::string&>(), nb::keep_alive<1, 2>())
        .def("embed", &Recorder::embed, nb::keep_alive<1, 2>())
        .def("rms_norm", &Recorder::rms_norm, nb::arg("x"), nb::arg("weight").none(),
             nb::arg("eps"), nb::keep_alive<1, 3>())
        .def("linear", &Recorder::linear, nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(),
             nb::arg("updates"), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(),
             nb::keep_alive<1, 5>())
        .def("gated", &Recorder::gated, nb::arg("x"), nb::arg("gate"), nb::arg("gate_bias").none(),
             nb::arg("gate_updates"), nb::arg("up"), nb::arg("up_bias").none(),
             nb::arg("up_updates"), nb::arg("activation"), nb::keep_alive<1, 3>(),
             nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>(),
             nb::keep_alive<1, 7>(), nb::keep_alive<1, 8>())
        .def("rope_and_store", &Recorder::rope_and_store, nb::arg("q"), nb::arg("k"),
             nb::arg("v"), nb::arg("q_norm").none(), nb::arg("k_norm").none(),
             nb::arg("attention"), nb::arg("frequencies"), nb::arg("cells"),
             nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>(), nb::keep_alive<1, 9>())
        .def("rope", &Recorder::rope, nb::arg("q"), nb::arg("q_norm").none(), nb::arg("attention"),
             nb::arg("frequencies"), nb::keep_alive<1, 3>())
        .def("attend", &Recorder::attend, nb::keep_alive<1, 4>())
        .def("route_experts", &Recorder::route_experts, nb::keep_alive<1, 4>(),
             nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>())
        .def("per_layer_inputs", &Recorder::per_layer_inputs, nb::keep_alive<1, 4>())
        .def("gate_by", &Recorder::gate_by)
        .def("residual", &Recorder::residual, nb::arg("x"), nb::arg("update"),
             nb::arg("norm").none(), nb::arg("eps"), nb::arg("scalar").none(),
             nb::keep_alive<1, 4>(), nb::keep_alive<1, 6>())
        .def("select", &Recorder::select)
        .def("given", &Recorder::given)
        .def("concat", &Recorder::concat)
        .def("clusters", &Recorder::clusters, nb::keep_alive<1, 4>())
        .def("finish", &Recorder::finish)
        .def("run", &Recorder::run, nb::arg("token_ids").noconvert(), nb::arg("spans").noconvert(),
             nb::arg("pages").noconvert(), nb::arg("wanted").noconvert(),
             nb::arg("given").noconvert())
        .def("scratch_bytes", &Recorder::scratch_bytes);
}
