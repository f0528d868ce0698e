#include <algorithm>
#include <vector>

#include "sequence/gather_evidence.h"

namespace metarec {

void plan_evidence(const EvidenceGraph& graph, const Histories& histories, const AgeGroups& ages, int64_t* packed) {
    packed[0] = 0;
#pragma omp parallel if (histories.offsets[histories.B] > 4096)
    {
        std::vector<int64_t> last(graph.V, -1);  // the case that met an item last
#pragma omp for schedule(dynamic, 4)
        for (int64_t b = 0; b < histories.B; ++b) {
            const int64_t end = histories.offsets[b + 1];
            const int64_t length = std::min(end - histories.offsets[b], ages.bounds[ages.groups]);
            int64_t count = 0;
            for (int64_t age = 0; age < length; ++age) {
                const int64_t item = histories.items[end - 1 - age];
                for (int64_t e = graph.offsets[item]; e < graph.offsets[item + 1]; ++e) {
                    count += last[graph.items[e]] != b;
                    last[graph.items[e]] = b;
                }
            }
            packed[b + 1] = count;
        }
    }
    for (int64_t b = 0; b < histories.B; ++b) packed[b + 1] += packed[b];
}

void list_candidates(const EvidenceGraph& graph, const Histories& histories, const AgeGroups& ages,
                     const int64_t* packed, int64_t* candidates) {
#pragma omp parallel if (histories.offsets[histories.B] > 4096)
    {
        std::vector<int64_t> last(graph.V, -1);
#pragma omp for schedule(dynamic, 4)
        for (int64_t b = 0; b < histories.B; ++b) {
            const int64_t end = histories.offsets[b + 1];
            const int64_t length = std::min(end - histories.offsets[b], ages.bounds[ages.groups]);
            int64_t* next = candidates + packed[b];
            for (int64_t age = 0; age < length; ++age) {
                const int64_t item = histories.items[end - 1 - age];
                for (int64_t e = graph.offsets[item]; e < graph.offsets[item + 1]; ++e) {
                    if (last[graph.items[e]] != b) *next++ = graph.items[e];
                    last[graph.items[e]] = b;
                }
            }
            std::sort(candidates + packed[b], next);
        }
    }
}

}  // namespace metarec
