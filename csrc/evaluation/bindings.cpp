#include "core/bindings.h"

#include <new>

#include "evaluation/target_ranks.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;

namespace metarec {
namespace {

// Items are addresses within the table.
void check_items(const char* name, const int64_t* items, int64_t count, int64_t V) {
    for (int64_t i = 0; i < count; ++i) {
        if (items[i] < 0 || items[i] >= V) {
            throw std::invalid_argument(std::string(name) + " must lie in [0, " + std::to_string(V) +
                                        "), the rows of table, got " + std::to_string(items[i]) + " at position " +
                                        std::to_string(i));
        }
    }
}

void check_lists(const ItemLists& lists, const char* name, int64_t B, int64_t count, int64_t V) {
    if (lists.offsets == nullptr) return;
    check_offsets(lists.offsets, B, count);
    check_items(name, lists.items, count, V);
}

void check_rising(const ItemLists& lists, int64_t B) {
    if (lists.offsets == nullptr) return;
    for (int64_t b = 0; b < B; ++b) {
        for (int64_t i = lists.offsets[b] + 1; i < lists.offsets[b + 1]; ++i) {
            if (lists.items[i] <= lists.items[i - 1]) {
                throw std::invalid_argument("added items must rise within each case, got " +
                                            std::to_string(lists.items[i]) + " after " +
                                            std::to_string(lists.items[i - 1]) + " in case " + std::to_string(b));
            }
        }
    }
}

// Memory of one call, aligned to a cache line.
struct Scratch {
    explicit Scratch(size_t bytes) : memory(::operator new(bytes, std::align_val_t{64})) {}
    ~Scratch() { ::operator delete(memory, std::align_val_t{64}); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    void* memory;
};

template <typename T, typename Run>
void rank(Run run, const RankProblem<T>& problem, const RankCounts& counts) {
#ifdef _OPENMP
    const int threads = problem.B * problem.V * problem.D < 1 << 15 ? 1 : omp_get_max_threads();
#else
    const int threads = 1;
#endif
    const Scratch scratch(threads * METAREC_DISPATCH(target_ranks_scratch)(problem.V, problem.D));
    run(problem, counts, threads, scratch.memory);
}

}  // namespace

void bind_evaluation(py::module_& m) {
    // Null addresses stand for no bias, nothing seen and nothing added.
    m.def(
        "target_ranks",
        [](uintptr_t h, uintptr_t table, uintptr_t bias, uintptr_t targets, uintptr_t seen_offsets,
           uintptr_t seen_items, uintptr_t added_offsets, uintptr_t added_items, uintptr_t added_terms,
           uintptr_t greater, uintptr_t equal, uintptr_t nonfinite, int64_t B, int64_t V, int64_t D, int64_t num_seen,
           int64_t num_added, bool is_double) {
            const ItemLists seen = {pointer<const int64_t>(seen_offsets), pointer<const int64_t>(seen_items)};
            const ItemLists added = {pointer<const int64_t>(added_offsets), pointer<const int64_t>(added_items)};
            const RankCounts counts = {pointer<int64_t>(greater), pointer<int64_t>(equal), pointer<int64_t>(nonfinite)};
            py::gil_scoped_release release;
            check_items("targets", pointer<const int64_t>(targets), B, V);
            check_lists(seen, "seen items", B, num_seen, V);
            check_lists(added, "added items", B, num_added, V);
            check_rising(added, B);
            if (is_double) {
                rank(METAREC_DISPATCH(target_ranks_f64),
                     RankProblem<double>{pointer<const double>(h), pointer<const double>(table),
                                         pointer<const double>(bias), pointer<const int64_t>(targets), seen, added,
                                         pointer<const double>(added_terms), B, V, D},
                     counts);
            } else {
                rank(METAREC_DISPATCH(target_ranks_f32),
                     RankProblem<float>{pointer<const float>(h), pointer<const float>(table),
                                        pointer<const float>(bias), pointer<const int64_t>(targets), seen, added,
                                        pointer<const float>(added_terms), B, V, D},
                     counts);
            }
        },
        py::arg("h"), py::arg("table"), py::arg("bias"), py::arg("targets"), py::arg("seen_offsets"),
        py::arg("seen_items"), py::arg("added_offsets"), py::arg("added_items"), py::arg("added_terms"),
        py::arg("greater"), py::arg("equal"), py::arg("nonfinite"), py::kw_only(), py::arg("B"), py::arg("V"),
        py::arg("D"), py::arg("num_seen"), py::arg("num_added"), py::arg("is_double"));
}

}  // namespace metarec
