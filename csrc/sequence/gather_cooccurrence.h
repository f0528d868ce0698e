// Candidates that occurred together with the events of a history, and what speaks for each.
// The definition is metarec_fast/reference/gather_cooccurrence.py.
#pragma once

#include <cstdint>

#include "core/isa.h"

namespace metarec {

// A sparse matrix of items x items, several relations wide.
struct CooccurrenceGraph {
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
void plan_cooccurrence(const CooccurrenceGraph& graph, const Histories& histories, const AgeGroups& ages,
                       int64_t* packed);

// candidates [N], rising in each case. Not of an instruction set: it sorts with the standard library.
void list_candidates(const CooccurrenceGraph& graph, const Histories& histories, const AgeGroups& ages,
                     const int64_t* packed, int64_t* candidates);

// Scratch: of each item its place among the candidates of a case, [threads, V], all -1 before and after.
struct Places {
    int32_t* of_items;
    int threads;
};

}  // namespace metarec

// features [N, groups * relations + 1].
METAREC_KERNEL(void gather_cooccurrence(const CooccurrenceGraph& graph, const Histories& histories,
                                        const AgeGroups& ages, const int64_t* packed, const int64_t* candidates,
                                        Places places, float* features))
