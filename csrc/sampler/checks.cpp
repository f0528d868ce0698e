#include "sampler/checks.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace metarec {
namespace {

using std::to_string;

void check_segments(const NegativeRows& in, int64_t positions) {
    bool rising = in.segments[0] == 0 && in.segments[in.rows] == positions;
    for (int64_t b = 0; b < in.rows && rising; ++b) rising = in.segments[b] <= in.segments[b + 1];
    if (!rising) throw std::invalid_argument("segments must rise from 0");
    for (int64_t b = 0; b < in.rows; ++b) {
        // two slots share a block, and the counter has 32 bits for blocks
        if (in.segments[b + 1] - in.segments[b] > (int64_t(1) << 33) / std::max<int64_t>(in.count, 1)) {
            throw std::invalid_argument("a row can draw 2**33 negatives at most, position " + to_string(b) +
                                        " of rows needs more");
        }
    }
}

void check_unseen(const NegativeRows& in, const int64_t* seen_weights, const int64_t* names) {
    for (int64_t b = 0; b < in.rows; ++b) {
        const int64_t u = in.users[b];
        const bool all = seen_weights ? uint64_t(seen_weights[u]) >= uint64_t(in.num_items) * kCapacity
                                      : in.seen_counts[u] >= in.num_items;
        if (all && in.segments[b + 1] > in.segments[b]) {
            throw std::invalid_argument("row " + to_string(names[b]) + " has seen every item that could be drawn (" +
                                        to_string(in.seen_counts[u]) + " of " + to_string(in.num_items) +
                                        "): no negative exists; leave such users out");
        }
    }
}

}  // namespace

Randomness checked_randomness(uint64_t seed, uint64_t stream, int64_t step, Purpose purpose) {
    if (step < 0 || step >> 48) throw std::invalid_argument("step must be in [0, 2**48), got " + to_string(step));
    return make_randomness(seed, stream, uint64_t(step), purpose);
}

void check_first_row(int64_t first_row, int64_t rows) {
    if (first_row < 0 || first_row + rows > int64_t(1) << 32) {
        throw std::invalid_argument("first_row must be in [0, 2**32 - rows], got " + to_string(first_row));
    }
}

void check_users(const int64_t* users, int64_t rows, const Sequences& data, int64_t num_users, int64_t events) {
    for (int64_t b = 0; b < rows; ++b) {
        const int64_t u = users[b];
        if (u < 0 || u >= num_users) {
            throw std::invalid_argument("rows must be in [0, " + to_string(num_users) + "), got " + to_string(u));
        }
        if (data.begins[u] < 0 || data.begins[u] > data.ends[u] || data.ends[u] > events) {
            throw std::invalid_argument("offsets must rise from 0 to the number of items (" + to_string(events) +
                                        "), got " + to_string(data.begins[u]) + " to " + to_string(data.ends[u]) +
                                        " for row " + to_string(u));
        }
    }
}

void draw_negatives(const NegativeRows& in, const Popularity& popularity, const int64_t* names, int64_t num_users,
                    int64_t positions) {
    check_first_row(in.first_row, in.rows);
    check_segments(in, positions);
    for (int64_t b = 0; b < in.rows; ++b) {
        if (in.users[b] < 0 || in.users[b] >= num_users) {
            throw std::invalid_argument("rows must be in [0, " + to_string(num_users) + "), got " +
                                        to_string(in.users[b]));
        }
    }
    if (in.count == 0) return;
    check_unseen(in, popularity.seen_weights, names);
    if (popularity.cells == nullptr) {
        METAREC_DISPATCH(uniform_negatives)(in);
    } else {
        METAREC_DISPATCH(popular_negatives)(in, popularity);
    }
}

}  // namespace metarec
