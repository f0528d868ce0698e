#include "sequence/gather_evidence.h"

#include <algorithm>
#include <vector>

namespace metarec::METAREC_ISA {

void gather_evidence(const EvidenceGraph& graph, const Histories& histories, const AgeGroups& ages,
                     const int64_t* packed, int64_t* candidates, float* features) {
    const int64_t R = graph.relations, width = ages.groups * R + 1;
#pragma omp parallel if (packed[histories.B] * width > 1 << 20)
    {
        std::vector<int32_t> place(graph.V, -1);  // of a candidate among those of its case
#pragma omp for schedule(dynamic, 4)
        for (int64_t b = 0; b < histories.B; ++b) {
            const int64_t begin = histories.offsets[b], end = histories.offsets[b + 1];
            const int64_t length = std::min(end - begin, ages.bounds[ages.groups]);
            int64_t* mine = candidates + packed[b];
            float* rows = features + packed[b] * width;
            int64_t count = 0;
            for (int64_t age = 0; age < length; ++age) {
                const int64_t item = histories.items[end - 1 - age];
                for (int64_t e = graph.offsets[item]; e < graph.offsets[item + 1]; ++e) {
                    if (place[graph.items[e]] < 0) {
                        place[graph.items[e]] = 0;
                        mine[count++] = graph.items[e];
                    }
                }
            }
            std::sort(mine, mine + count);
            for (int64_t i = 0; i < count; ++i) place[mine[i]] = int32_t(i);
            std::fill(rows, rows + count * width, 0.0f);
            for (int64_t g = 0; g < ages.groups; ++g) {
                const int64_t oldest = std::min(ages.bounds[g + 1], length);
                const float share = 1.0f / float(std::max<int64_t>(oldest - ages.bounds[g], 1));
                for (int64_t age = ages.bounds[g]; age < oldest; ++age) {
                    const int64_t item = histories.items[end - 1 - age];
                    for (int64_t e = graph.offsets[item]; e < graph.offsets[item + 1]; ++e) {
                        const float* __restrict from = graph.values + e * R;
                        float* __restrict to = rows + place[graph.items[e]] * width + g * R;
                        for (int64_t r = 0; r < R; ++r) to[r] += share * from[r];
                    }
                }
            }
            for (int64_t at = begin; at < end; ++at) {  // also of events too old to speak
                const int32_t i = place[histories.items[at]];
                if (i >= 0) rows[i * width + width - 1] = 1.0f;
            }
            for (int64_t i = 0; i < count; ++i) place[mine[i]] = -1;
        }
    }
}

}  // namespace metarec::METAREC_ISA
