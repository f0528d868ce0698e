#include "sampler/epoch_batches.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <numeric>
#include <stdexcept>
#include <string>

#include "sampler/checks.h"
#include "sampler/epoch_order.h"
#include "sampler/seen.h"

namespace metarec {
namespace {

constexpr int64_t kNarrow = int64_t(1) << 31;  // catalogues up to here have 32-bit ids inside

// 0, 1, ..., count
std::vector<int64_t> one_each(int64_t count) {
    std::vector<int64_t> numbers(size_t(count) + 1);
    std::iota(numbers.begin(), numbers.end(), 0);
    return numbers;
}

}  // namespace

EpochBatches::Place EpochBatches::place(int64_t step) const {
    const int64_t per_epoch = (windows + batch_size - 1) / batch_size;
    Place at;
    at.epoch = step / per_epoch;
    at.first = step % per_epoch * batch_size;
    at.rows = std::min(batch_size, windows - at.first);
    at.own_first = at.rows * rank / world_size;
    at.own_rows = at.rows * (rank + 1) / world_size - at.own_first;
    at.planned_first = target_shares ? 0 : at.own_first;
    at.planned_rows = target_shares ? at.rows : at.own_rows;
    return at;
}

// scratch: users[n], begins[n], packed[n + 1] of the n planned rows.
void EpochBatches::plan(int64_t step, int64_t* scratch) const {
    checked_randomness(seed, stream, step, Purpose::crop);  // a step that is none is refused before it is divided
    const Place at = place(step);
    const int64_t n = at.planned_rows;
    int64_t *users = scratch, *begins = users + n, *packed = begins + n;
    int64_t *ids = begins, *index = packed + 1;  // until the windows themselves take their place
    METAREC_DISPATCH(epoch_order)
    (checked_randomness(seed, order_stream, at.epoch, Purpose::permutation), windows, at.first + at.planned_first, n,
     ids);
    if (owners) {
        for (int64_t b = 0; b < n; ++b) users[b] = owners[ids[b]], index[b] = 0;
    } else {
        locate_windows(starts, num_users, ids, n, users, index);
    }
    check_users(users, n, shown, num_users, events);
    plan_windows(shown, users, index, n, at.planned_first, window, max_length, stride,
                 checked_randomness(seed, stream, step, Purpose::crop), begins, packed);
    for (int64_t b = 0; b < n && last_target; ++b) {  // the target of an empty window would lie outside it
        if (packed[b + 1] == packed[b]) {
            throw std::invalid_argument("starts must give windows of one input at least where targets are the last, " +
                                        std::string("got an empty one of user ") + std::to_string(users[b]));
        }
    }
    fetch(users, begins, n);
}

// Users lie anywhere in memory: what `fill` reads of them is prefetched together, not row by row. Most have two lines.
void EpochBatches::fetch(const int64_t* users, const int64_t* begins, int64_t rows) const {
    const auto* const items = static_cast<const char*>(shown.items);
    const auto* const avoided = static_cast<const char*>(seen);
    for (int64_t b = 0; b < rows; ++b) {
        const char* row = items + begins[b] * (shown.wide ? 8 : 4);
        __builtin_prefetch(row);
        __builtin_prefetch(row + 64);
        if (seen_offsets) {
            const char* user = avoided + seen_offsets[users[b]] * (num_items > kNarrow ? 8 : 4);
            __builtin_prefetch(seen_counts + users[b]);
            __builtin_prefetch(user);
            __builtin_prefetch(user + 64);
        }
    }
}

EpochBatches::Sizes EpochBatches::sizes(int64_t step, const int64_t* scratch) const {
    const Place at = place(step);
    const int64_t* packed = scratch + 2 * at.planned_rows;
    const int64_t own = at.own_first - at.planned_first;
    const int64_t items = packed[own + at.own_rows] - packed[own], targets = last_target ? at.own_rows : items;
    const int64_t in_batch = !target_shares ? 0 : last_target ? at.rows : packed[at.rows];
    return {at.own_rows, at.own_rows + 1, items, targets, targets * negatives + in_batch + shared_negatives};
}

void EpochBatches::fill(int64_t step, const int64_t* scratch, int64_t* shown_to, int64_t* drawn, float* logq) const {
    const Place at = place(step);
    const int64_t n = at.planned_rows, own = at.own_first - at.planned_first, rows = at.own_rows;
    const int64_t *begins = scratch + n + own, *packed = scratch + 2 * n + own;
    const Sizes size = sizes(step, scratch);
    int64_t *users = shown_to, *offsets = users + size.users, *items = offsets + size.offsets;
    int64_t* targets = items + size.items;

    std::copy_n(scratch + own, rows, users);
    for (int64_t b = 0; b <= rows; ++b) offsets[b] = packed[b] - packed[0];
    copy_windows(shown, begins, packed, rows, items, last_target ? nullptr : targets);
    if (last_target) {
        for (int64_t b = 0; b < rows; ++b) targets[b] = shown.item(begins[b] + packed[b + 1] - packed[b]);
    }
    if (negatives > 0) {
        fill_negatives(step, at, users, last_target ? one_each(rows).data() : offsets, drawn, logq);
    }
    if (shared_negatives > 0 || target_shares) {
        const int64_t skipped = size.targets * negatives;
        fill_shared(step, at, scratch, drawn + skipped, logq + skipped);
    }
}

void EpochBatches::fill_negatives(int64_t step, const Place& at, const int64_t* users, const int64_t* segments,
                                  int64_t* out, float* logq) const {
    const int64_t rows = at.own_rows;
    NegativeRows in{users,
                    segments,
                    rows,
                    at.own_first,
                    negatives,
                    num_items,
                    seen_offsets,
                    seen_counts,
                    seen,
                    num_items > kNarrow,
                    checked_randomness(seed, stream, step, Purpose::negative),
                    out,
                    logq};
    Popularity distribution = popularity;
    std::vector<int64_t> row, seen_at, counts, weights;
    std::vector<char> sorted;
    if (seen_offsets == nullptr) {
        row = one_each(rows), seen_at.resize(size_t(rows) + 1), counts.resize(size_t(rows)),
        weights.resize(size_t(rows));
        check_users(users, rows, whole, num_users, events);
        row_lengths(whole, users, rows, seen_at.data());
        sorted.resize(size_t(seen_at[rows]) * (in.wide ? 8 : 4));
        const int64_t bad =
            sorted_items(whole, users, rows, num_items, in.wide, seen_at.data(), sorted.data(), counts.data());
        if (bad >= 0) {
            throw std::invalid_argument("items must be in [0, " + std::to_string(num_items) + "), but user " +
                                        std::to_string(users[bad]) + " holds one that is not");
        }
        in.users = row.data(), in.seen_offsets = seen_at.data(), in.seen_counts = counts.data(),
        in.seen = sorted.data();
        if (popularity.cells) {
            row_weights(seen_at.data(), counts.data(), reinterpret_cast<const int32_t*>(sorted.data()), rows,
                        popularity.cumulative, weights.data());
            distribution.seen_weights = weights.data();
        }
    }
    draw_negatives(in, distribution, users, seen_offsets ? num_users : rows, segments[rows]);
}

// The targets of the batch of all ranks, then shared draws; log q of any of them is that of the two taken together.
void EpochBatches::fill_shared(int64_t step, const Place& at, const int64_t* scratch, int64_t* out, float* logq) const {
    int64_t in_batch = 0;
    if (target_shares) {
        const int64_t *begins = scratch + at.rows, *packed = begins + at.rows;
        in_batch = last_target ? at.rows : packed[at.rows];
        for (int64_t b = 0, to = 0; b < at.rows; ++b) {
            const int64_t length = packed[b + 1] - packed[b];
            for (int64_t i = last_target ? length : 1; i <= length; ++i) out[to++] = shown.item(begins[b] + i);
        }
        for (int64_t i = 0; i < in_batch; ++i) {
            if (out[i] < 0 || out[i] >= num_items) {
                throw std::invalid_argument("items must be in [0, " + std::to_string(num_items) + "), got " +
                                            std::to_string(out[i]));
            }
        }
    }
    const int64_t nobody = 0, segments[2] = {0, 1}, nothing[2] = {0, 0};
    const NegativeRows in{&nobody,
                          segments,
                          1,
                          0,
                          shared_negatives,
                          num_items,
                          nothing,
                          nothing,
                          nullptr,
                          num_items > kNarrow,
                          checked_randomness(seed, stream, step, Purpose::shared),
                          out + in_batch,
                          logq + in_batch};
    Popularity distribution = popularity;
    if (distribution.cells) distribution.seen_weights = nothing;
    draw_negatives(in, distribution, &nobody, 1, 1);
    if (!target_shares) return;

    const double all = double(in_batch + shared_negatives), total = double(num_items) * double(kCapacity);
    for (int64_t i = 0; i < in_batch + shared_negatives; ++i) {
        const int64_t item = out[i];
        const double q = popularity.cells
                             ? double(popularity.cumulative[item + 1] - popularity.cumulative[item]) / total
                             : 1.0 / double(num_items);
        logq[i] = float(std::log((double(in_batch) * target_shares[item] + double(shared_negatives) * q) / all));
    }
}

BatchPlan::BatchPlan(std::vector<const EpochBatches*> domains, std::vector<int64_t> steps)
    : domains_(std::move(domains)), steps_(std::move(steps)) {
    if (domains_.size() != steps_.size()) {
        throw std::invalid_argument("steps must be one to a domain (" + std::to_string(domains_.size()) + "), got " +
                                    std::to_string(steps_.size()));
    }
    int64_t size = 0;
    for (const EpochBatches* domain : domains_) {
        starts_.push_back(size);
        size += domain->scratch_size();
    }
    scratch_.resize(size_t(size));
    for (size_t i = 0; i < domains_.size(); ++i) {
        int64_t* scratch = scratch_.data() + starts_[i];
        domains_[i]->plan(steps_[i], scratch);
        sizes_.push_back(domains_[i]->sizes(steps_[i], scratch));
    }
}

void BatchPlan::fill(int64_t* windows, int64_t* negatives, float* logq) const {
    struct Part {
        int64_t *windows, *negatives;
        float* logq;
    };
    std::vector<Part> parts;
    int64_t work = 0;
    for (const EpochBatches::Sizes& size : sizes_) {
        parts.push_back({windows, negatives, logq});
        windows += size.users + size.offsets + size.items + size.targets;
        negatives += size.negatives;
        logq += size.negatives;
        work += size.items + size.negatives;
    }
    std::exception_ptr failure;  // none may leave the parallel region
#pragma omp parallel for schedule(dynamic, 1) if (parts.size() > 1 && work > 65536)
    for (size_t i = 0; i < parts.size(); ++i) {
        try {
            domains_[i]->fill(steps_[i], scratch_.data() + starts_[i], parts[i].windows, parts[i].negatives,
                              parts[i].logq);
        } catch (...) {
#pragma omp critical
            failure = std::current_exception();
        }
    }
    if (failure) std::rethrow_exception(failure);
}

}  // namespace metarec
