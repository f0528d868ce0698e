#include "sampler/windows.h"

#include <algorithm>

namespace metarec {
namespace {

constexpr int64_t kAhead = 8;  // rows whose events are fetched early: users lie anywhere in memory

template <typename T>
void copy_row(const T* __restrict events, int64_t length, int64_t* __restrict inputs, int64_t* __restrict targets) {
    for (int64_t i = 0; i < length; ++i) inputs[i] = events[i];
    if (targets == nullptr) return;
    for (int64_t i = 0; i < length; ++i) targets[i] = events[i + 1];
}

}  // namespace

void locate_windows(const int64_t* starts, int64_t num_users, const int64_t* ids, int64_t count, int64_t* users,
                    int64_t* index) {
    for (int64_t i = 0; i < count; ++i) {
        const int64_t* last = starts;  // the last start at or under ids[i], without branches that cannot be predicted
        for (int64_t length = num_users + 1, half; length > 1; length -= half) {
            half = length / 2;
            last += last[half] <= ids[i] ? half : 0;
        }
        users[i] = last - starts;
        index[i] = std::max<int64_t>(ids[i] - *last, 0);  // whatever starts hold, no index falls outside
    }
}

void plan_windows(const Sequences& data, const int64_t* users, const int64_t* index, int64_t rows, int64_t first_row,
                  Window window, int64_t max_length, int64_t stride, const Randomness& random, int64_t* begins,
                  int64_t* packed) {
    packed[0] = 0;
    for (int64_t b = 0; b < rows; ++b) {
        const int64_t start = data.begins[users[b]];
        const int64_t inputs = std::max<int64_t>(data.ends[users[b]] - start - 1, 0);
        int64_t end = inputs;
        if (window == Window::sliding) {
            // index * stride may pass the largest integer; past the oldest event it no longer matters
            end = index[b] > inputs / stride ? 0 : inputs - index[b] * stride;
        } else if (window == Window::crop && inputs > max_length) {
            const uint64_t starts = uint64_t(inputs - max_length + 1);
            end = max_length + int64_t(bounded_wide(random, starts, 0, uint32_t(first_row + b), 0));
        }
        const int64_t begin = std::max<int64_t>(end - max_length, 0);
        begins[b] = start + begin;
        packed[b + 1] = packed[b] + end - begin;
    }
}

void copy_windows(const Sequences& data, const int64_t* begins, const int64_t* packed, int64_t rows, int64_t* inputs,
                  int64_t* targets) {
#pragma omp parallel for schedule(static) if (packed[rows] - packed[0] > 65536)
    for (int64_t b = 0; b < rows; ++b) {
        const int64_t at = packed[b] - packed[0], length = packed[b + 1] - packed[b];
        const int64_t ahead = begins[std::min(b + kAhead, rows - 1)];
        __builtin_prefetch(static_cast<const char*>(data.items) + ahead * (data.wide ? 8 : 4));
        if (data.wide) {
            copy_row(static_cast<const int64_t*>(data.items) + begins[b], length, inputs + at,
                     targets ? targets + at : nullptr);
        } else {
            copy_row(static_cast<const int32_t*>(data.items) + begins[b], length, inputs + at,
                     targets ? targets + at : nullptr);
        }
    }
}

template <typename Value>
void pad_rows(const Value* values, const int64_t* offsets, int64_t rows, int64_t length, int64_t count, Side side,
              Value fill, Value* out) {
#pragma omp parallel for schedule(static) if (rows * length * count > 65536)
    for (int64_t b = 0; b < rows; ++b) {
        const int64_t kept = std::min(offsets[b + 1] - offsets[b], length) * count, room = length * count;
        const Value* last = values + offsets[b + 1] * count;
        Value* row = out + b * room;
        Value* valid = side == Side::left ? row + room - kept : row;
        std::fill(row, valid, fill);
        std::copy(last - kept, last, valid);
        std::fill(valid + kept, row + room, fill);
    }
}

template void pad_rows(const int64_t*, const int64_t*, int64_t, int64_t, int64_t, Side, int64_t, int64_t*);
template void pad_rows(const int32_t*, const int64_t*, int64_t, int64_t, int64_t, Side, int32_t, int32_t*);

}  // namespace metarec
