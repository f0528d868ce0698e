// The batches of one domain: which windows a step shows, and the negatives beside them.
#pragma once

#include <cstdint>
#include <vector>

#include "sampler/negatives.h"
#include "sampler/windows.h"

namespace metarec {

// What a domain's batches have in common, bound once. The arrays belong to the caller.
//
// A batch is drawn in two parts, so that the caller can make room in between: `plan` finds its windows and `fill`
// writes it. Both are functions of the step alone. A rank gets its share of the rows of the batch of all ranks.
struct EpochBatches {
    Sequences shown;        // what windows show of each user
    Sequences whole;        // what negatives avoid
    const int64_t* starts;  // [num_users + 1]: user u has the windows starts[u] to starts[u + 1] - 1, the newest first
    const int64_t* owners;  // [windows]: whose each window is, where no user has two; null: found from starts
    int64_t num_users, windows, events, batch_size, rank, world_size;
    Window window;
    int64_t max_length, stride;
    bool last_target;                     // targets and negatives of a window's last position alone
    uint64_t seed, stream, order_stream;  // order_stream: of the epochs' order alone

    int64_t num_items, negatives, shared_negatives;  // of a position, of the batch
    const int64_t* seen_offsets;                     // as in NegativeRows; null: a batch sorts what its users have seen
    const int64_t* seen_counts;
    const void* seen;
    Popularity popularity;        // without cells: uniform
    const double* target_shares;  // of each item among the targets of an epoch; null: no in-batch negatives

    // Numbers of elements in the order in which `fill` writes them; as many logs of probability as negatives.
    struct Sizes {
        int64_t users, offsets, items, targets, negatives;
    };

    int64_t scratch_size() const { return 3 * batch_size + 1; }
    void plan(int64_t step, int64_t* scratch) const;
    Sizes sizes(int64_t step, const int64_t* scratch) const;
    void fill(int64_t step, const int64_t* scratch, int64_t* shown_to, int64_t* drawn, float* logq) const;

  private:
    struct Place {
        int64_t epoch, first, rows;  // the batch of all ranks: places of the epoch
        int64_t planned_first,
            planned_rows;             // of its rows, those planned here: this rank's; all for in-batch negatives
        int64_t own_first, own_rows;  // this rank's
    };
    Place place(int64_t step) const;
    void fetch(const int64_t* users, const int64_t* begins, int64_t rows) const;
    void fill_negatives(int64_t step, const Place& at, const int64_t* users, const int64_t* segments, int64_t* out,
                        float* logq) const;
    void fill_shared(int64_t step, const Place& at, const int64_t* scratch, int64_t* out, float* logq) const;
};

// The batches of several domains, domain i at steps[i], in two parts: made, its windows are known, and the caller can
// make room for what `fill` writes, one batch after the other.
class BatchPlan {
  public:
    BatchPlan(std::vector<const EpochBatches*> domains, std::vector<int64_t> steps);
    const std::vector<EpochBatches::Sizes>& sizes() const { return sizes_; }
    // Throws what cannot be drawn; the arrays then hold no batch.
    void fill(int64_t* windows, int64_t* negatives, float* logq) const;

  private:
    std::vector<const EpochBatches*> domains_;
    std::vector<int64_t> steps_, scratch_, starts_;  // starts_: where each domain's scratch begins
    std::vector<EpochBatches::Sizes> sizes_;
};

}  // namespace metarec
