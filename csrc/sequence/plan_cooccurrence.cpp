#include <algorithm>
#include <vector>

#include "sequence/gather_cooccurrence.h"

namespace metarec {
namespace {

// Calls found(b, k, item) for the k-th candidate that comes up in case b, and then done(b, how many there were).
template <class Found, class Done>
void walk(const CooccurrenceGraph& graph, const Histories& histories, const AgeGroups& ages, Found found, Done done) {
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
                    const int64_t candidate = graph.items[e];
                    if (last[candidate] != b) found(b, count++, candidate);
                    last[candidate] = b;
                }
            }
            done(b, count);
        }
    }
}

}  // namespace

void plan_cooccurrence(const CooccurrenceGraph& graph, const Histories& histories, const AgeGroups& ages,
                       int64_t* packed) {
    packed[0] = 0;
    walk(
        graph, histories, ages, [](int64_t, int64_t, int64_t) {},
        [=](int64_t b, int64_t count) { packed[b + 1] = count; });
    for (int64_t b = 0; b < histories.B; ++b) packed[b + 1] += packed[b];
}

void list_candidates(const CooccurrenceGraph& graph, const Histories& histories, const AgeGroups& ages,
                     const int64_t* packed, int64_t* candidates) {
    walk(
        graph, histories, ages, [=](int64_t b, int64_t k, int64_t item) { candidates[packed[b] + k] = item; },
        [=](int64_t b, int64_t count) { std::sort(candidates + packed[b], candidates + packed[b] + count); });
}

}  // namespace metarec
