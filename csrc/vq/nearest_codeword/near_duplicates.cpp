#include "vq/nearest_codeword/near_duplicates.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "vq/nearest_codeword/codebook.h"
#include "vq/nearest_codeword/hash.h"

namespace metarec {
namespace {

constexpr double kCell = 0x1p-4, kRadius = 0x1p-12;  // of the codes' median norm, per element and as a whole
constexpr double kLeastNorm = 1e-30;

// A hash of the grid cell of code - mean.
uint64_t cell(const float* code, const float* mean, int64_t dim, float inverse) {
    Hash hash;
    for (int64_t d = 0; d < dim; ++d) {
        hash.add(d % Hash::kChains, (code[d] - mean[d]) * inverse + 12582912.0f);  // 1.5 * 2^23: rounds to an integer
    }
    return hash.value();
}

double distance(const float* a, const float* b, int64_t dim) {
    double sum = 0;
    for (int64_t d = 0; d < dim; ++d) sum += (static_cast<double>(a[d]) - b[d]) * (static_cast<double>(a[d]) - b[d]);
    return std::sqrt(sum);
}

}  // namespace

// Codes that share a cell of a grid may be near-duplicates; those within a small distance of the first of them are.
NearDuplicates find_near_duplicates(const float* codes, const int32_t* slots, int64_t count, int64_t dim,
                                    const float* mean, const float* squares) {
    NearDuplicates result;
    if (count < kLeastCluster) return result;
    // the median: codes of unusual norm may be few
    std::vector<float> sorted(count);
    for (int64_t s = 0; s < count; ++s) sorted[s] = squares[slots[s]];
    std::nth_element(sorted.begin(), sorted.begin() + count / 2, sorted.end());
    const double typical = std::max(std::sqrt(static_cast<double>(sorted[count / 2])), kLeastNorm);
    const float inverse = static_cast<float>(std::sqrt(static_cast<double>(dim)) / (typical * kCell));
    std::vector<std::pair<uint64_t, int32_t>> order(count);  // by cell, then by index
#pragma omp parallel for schedule(static) if (count * dim > 1 << 15)
    for (int64_t s = 0; s < count; ++s) order[s] = {cell(codes + slots[s] * dim, mean, dim, inverse), slots[s]};
    std::sort(order.begin(), order.end());
    const double reach = typical * kRadius;
    for (int64_t begin = 0, end; begin < count; begin = end) {
        for (end = begin + 1; end < count && order[end].first == order[begin].first;) ++end;
        if (end - begin < kLeastCluster) continue;
        const float* centre = codes + order[begin].second * dim;
        for (int64_t i = begin; i < end; ++i) {
            const int32_t code = order[i].second;
            if (distance(codes + code * dim, centre, dim) <= reach) result.members.push_back(code);
        }
        const auto members = static_cast<int64_t>(result.members.size());
        if (members - result.first.back() < kLeastCluster) {
            result.members.resize(result.first.back());
        } else {
            result.first.push_back(members);
        }
    }
    return result;
}

}  // namespace metarec
