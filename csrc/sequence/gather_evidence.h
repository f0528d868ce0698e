// Candidates that occurred together with the events of a history, and what speaks for each.
// The definition is metarec_fast/reference/gather_evidence.py.
#pragma once

#include <cstdint>

#include "core/isa.h"

namespace metarec {

// A sparse matrix of items x items, several relations wide.
struct EvidenceGraph {
    const int64_t* offsets;  // [V+1]
    const int32_t* items;    // [E], rising in each row
    const float* values;     // [E, relations]
    int64_t V, relations;
};

struct Histories {
    const int64_t* offsets;  // [B+1]
    const int32_t* items;    // [T], oldest first
    int64_t B;
};

// Events are grouped by age, the newest being 0: group g has ages bounds[g] to bounds[g + 1] - 1.
struct AgeGroups {
    const int64_t* bounds;  // [groups + 1], rising from 0
    int64_t groups;
};

// packed [B+1]: where the candidates of each case begin.
void plan_evidence(const EvidenceGraph& graph, const Histories& histories, const AgeGroups& ages, int64_t* packed);

}  // namespace metarec

// candidates [N] rising in each case, features [N, groups * relations + 1].
METAREC_KERNEL(void gather_evidence(const EvidenceGraph& graph, const Histories& histories, const AgeGroups& ages,
                                    const int64_t* packed, int64_t* candidates, float* features))
