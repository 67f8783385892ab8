// Cosines and sines of rotary positions.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"

namespace hb {

// Of all pairs at a position, in f32 throughout, as models are trained.
inline void rotation(const std::vector<float>& frequencies, int position, float* cos, float* sin) {
    for (size_t i = 0; i < frequencies.size(); ++i) {
        const float angle = static_cast<float>(position) * frequencies[i];
        cos[i] = std::cos(angle);
        sin[i] = std::sin(angle);
    }
}

// The tables of `Turns`, for positions below `positions`, and for the pairs that turn at all.
class Rotations {
public:
    Rotations(const std::vector<float>& frequencies, size_t positions)
        : dim_(static_cast<int>(frequencies.size()) * 2), positions_(positions) {
        size_t turning = frequencies.size();
        while (turning > 0 && frequencies[turning - 1] == 0) --turning;
        turning = (turning + GROUP - 1) / GROUP * GROUP;
        frequencies_.assign(frequencies.begin(), frequencies.begin() + ptrdiff_t(turning));
        constexpr size_t base = KEY_TILE;
        fill(1, base);
        fill(base, base);
        fill(base * base, positions / (base * base) + 1);
    }
    int dim() const { return dim_; }
    size_t positions() const { return positions_; }
    Turns turns(const float* norm) const {
        return {norm, frequencies_.data(), table_.data(), static_cast<int>(frequencies_.size())};
    }

private:
    // Appends the rotations by 0, `unit`, ... (count - 1) * unit.
    void fill(size_t unit, size_t count) {
        for (size_t i = 0; i < count; ++i) {
            const auto position = static_cast<double>(unit * i);
            for (float frequency : frequencies_)
                table_.push_back(static_cast<float>(std::cos(position * double(frequency))));
            for (float frequency : frequencies_)
                table_.push_back(static_cast<float>(std::sin(position * double(frequency))));
        }
    }
    int dim_;
    size_t positions_;
    std::vector<float> frequencies_, table_;
};

}  // namespace hb
