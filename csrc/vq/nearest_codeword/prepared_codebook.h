// Owns the arrays of a Codebook.
#pragma once

#include <memory>

#include "vq/nearest_codeword/codebook.h"

namespace metarec {

struct FreeAligned {
    void operator()(void* memory) const;
};
using AlignedMemory = std::unique_ptr<void, FreeAligned>;
AlignedMemory allocate_aligned(size_t bytes);

class PreparedCodebook {
  public:
    // bits: 8 or 16 for the screen in integers, 32 for the search in float32, with near-duplicate clusters.
    PreparedCodebook(const float* codebook, int64_t heads, int64_t codes, int64_t dim, int bits, Metric metric);
    const Codebook& view() const { return view_; }

  private:
    void add_clusters(const float* squares);
    void order_slots(int64_t h, const float* squares);

    AlignedMemory memory_, scan_memory_, cluster_memory_;
    Codebook view_;
};

}  // namespace metarec
