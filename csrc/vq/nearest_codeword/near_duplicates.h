// Clusters of codes that are nearly equal, as a collapsed codebook has.
#pragma once

#include <cstdint>
#include <vector>

namespace metarec {

struct NearDuplicates {
    std::vector<int32_t> members;      // codes, cluster after cluster, ascending in each
    std::vector<int64_t> first = {0};  // [clusters + 1] where those of a cluster begin
};

// The clusters of one head, each of at least kLeastCluster codes. slots: the distinct finite codes, `count` indices
// into codes [., dim]; squares: ||code - mean||^2 by index.
NearDuplicates find_near_duplicates(const float* codes, const int32_t* slots, int64_t count, int64_t dim,
                                    const float* mean, const float* squares);

}  // namespace metarec
