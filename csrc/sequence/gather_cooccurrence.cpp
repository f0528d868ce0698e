#include "sequence/gather_cooccurrence.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace metarec::METAREC_ISA {

void gather_cooccurrence(const CooccurrenceGraph& graph, const Histories& histories, const AgeGroups& ages,
                         const int64_t* packed, const int64_t* candidates, Places places, float* features) {
    const int64_t R = graph.relations, width = ages.groups * R + 1;
#pragma omp parallel num_threads(places.threads)
    {
        int32_t* place = places.of_items;
#ifdef _OPENMP
        place += omp_get_thread_num() * graph.V;
#endif
#pragma omp for schedule(dynamic, 4)
        for (int64_t b = 0; b < histories.B; ++b) {
            const int64_t begin = histories.offsets[b], end = histories.offsets[b + 1];
            const int64_t count = packed[b + 1] - packed[b];
            const int64_t* mine = candidates + packed[b];
            float* rows = features + packed[b] * width;
            for (int64_t i = 0; i < count; ++i) place[mine[i]] = int32_t(i);
            for (int64_t i = 0; i < count * width; ++i) rows[i] = 0.0f;
            for (int64_t g = 0; g < ages.groups; ++g) {
                const int64_t newest = ages.bounds[g];
                const int64_t oldest = ages.bounds[g + 1] < end - begin ? ages.bounds[g + 1] : end - begin;
                const float share = oldest > newest ? 1.0f / float(oldest - newest) : 0.0f;
                for (int64_t age = newest; age < oldest; ++age) {
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
