#include "sampler/seen.h"

#include <algorithm>

namespace metarec {
namespace {

template <typename In, typename Out>
int64_t sort_row(const In* events, int64_t length, int64_t num_items, Out* out) {
    for (int64_t i = 0; i < length; ++i) {
        if (events[i] < 0 || events[i] >= num_items) return -1;
        out[i] = Out(events[i]);
    }
    std::sort(out, out + length);
    return std::unique(out, out + length) - out;
}

template <typename In>
int64_t sort_row(const In* events, int64_t length, int64_t num_items, bool wide, void* out, int64_t at) {
    return wide ? sort_row(events, length, num_items, static_cast<int64_t*>(out) + at)
                : sort_row(events, length, num_items, static_cast<int32_t*>(out) + at);
}

}  // namespace

void row_lengths(const Sequences& data, const int64_t* users, int64_t rows, int64_t* offsets) {
    offsets[0] = 0;
    for (int64_t b = 0; b < rows; ++b) {
        offsets[b + 1] = offsets[b] + data.ends[users[b]] - data.begins[users[b]];
    }
}

int64_t sorted_items(const Sequences& data, const int64_t* users, int64_t rows, int64_t num_items, bool wide,
                     const int64_t* offsets, void* out, int64_t* counts) {
    int64_t bad = rows;
#pragma omp parallel for schedule(dynamic, 64) reduction(min : bad) if (offsets[rows] > 16384)
    for (int64_t b = 0; b < rows; ++b) {
        const int64_t start = data.begins[users[b]], length = offsets[b + 1] - offsets[b];
        counts[b] =
            data.wide
                ? sort_row(static_cast<const int64_t*>(data.items) + start, length, num_items, wide, out, offsets[b])
                : sort_row(static_cast<const int32_t*>(data.items) + start, length, num_items, wide, out, offsets[b]);
        if (counts[b] < 0) bad = std::min(bad, b);
    }
    return bad < rows ? bad : -1;
}

void row_weights(const int64_t* offsets, const int64_t* counts, const int32_t* seen, int64_t rows,
                 const int64_t* cumulative, int64_t* weights) {
#pragma omp parallel for schedule(static) if (offsets[rows] > 16384)
    for (int64_t b = 0; b < rows; ++b) {
        weights[b] = 0;
        for (int64_t i = offsets[b]; i < offsets[b] + counts[b]; ++i) {
            weights[b] += cumulative[seen[i] + 1] - cumulative[seen[i]];
        }
    }
}

bool build_alias(const int64_t* weights, int64_t size, AliasCell* cells) {
    constexpr int64_t capacity = int64_t(kCapacity);
    unsigned __int128 total = 0;
    for (int64_t i = 0; i < size; ++i) {
        if (weights[i] < 0) return false;
        total += static_cast<unsigned __int128>(weights[i]);
        cells[i].threshold = 0;
        cells[i].alias = uint32_t(i);
    }
    if (total != static_cast<unsigned __int128>(size) * kCapacity) return false;

    const auto next = [&](int64_t i, bool is_heavy) {
        while (i < size && (weights[i] > capacity) != is_heavy) ++i;
        return i;
    };
    int64_t light = next(0, false), heavy = next(0, true);
    int64_t left = heavy < size ? weights[heavy] : 0;
    while (heavy < size) {
        if (left > capacity) {  // exact sums: while a heavy item overflows there is a light one with room
            if (weights[light] < capacity) {
                cells[light].threshold = uint32_t(weights[light]);
                cells[light].alias = uint32_t(heavy);
                left -= capacity - weights[light];
            }
            light = next(light + 1, false);
        } else {
            const int64_t following = next(heavy + 1, true);
            if (left < capacity) {
                cells[heavy].threshold = uint32_t(left);
                cells[heavy].alias = uint32_t(following);
                left = weights[following] - (capacity - left);
            } else {
                left = following < size ? weights[following] : 0;
            }
            heavy = following;
        }
    }
    return true;
}

}  // namespace metarec
