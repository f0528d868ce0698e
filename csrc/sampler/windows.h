// Which events a batch shows: the stretch of each user's sequence.
#pragma once

#include <cstdint>

#include "sampler/philox.h"

namespace metarec {

// users[i] and index[i] = whose window ids[i] is, and which of the user's; user u has starts[u] to starts[u + 1] - 1.
void locate_windows(const int64_t* starts, int64_t num_users, const int64_t* ids, int64_t count, int64_t* users,
                    int64_t* index);

// Item sequences of users: events begins[u] to ends[u] - 1 of items; an item is 8 bytes if wide, else 4.
struct Sequences {
    const int64_t* begins;
    const int64_t* ends;
    const void* items;
    bool wide;

    int64_t item(int64_t event) const {
        return wide ? static_cast<const int64_t*>(items)[event] : static_cast<const int32_t*>(items)[event];
    }
};

enum class Window { last, sliding, crop };

// begins[b] = index into items of row b's first input; packed[b] .. packed[b + 1] = where its inputs go.
// index: which window of the user, 0 the newest, for sliding windows; may be packed + 1.
void plan_windows(const Sequences& data, const int64_t* users, const int64_t* index, int64_t rows, int64_t first_row,
                  Window window, int64_t max_length, int64_t stride, const Randomness& random, int64_t* begins,
                  int64_t* packed);
// Targets follow their inputs; targets may be null.
void copy_windows(const Sequences& data, const int64_t* begins, const int64_t* packed, int64_t rows, int64_t* inputs,
                  int64_t* targets);

enum class Side { left, right };

// out[b, length] = row b's values, its last ones if they do not fit, and fill on the side that is padded; count
// elements of Value to a position.
template <typename Value>
void pad_rows(const Value* values, const int64_t* offsets, int64_t rows, int64_t length, int64_t count, Side side,
              Value fill, Value* out);

}  // namespace metarec
