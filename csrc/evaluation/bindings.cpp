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

ItemLists lists(const Span& offsets, const Span& items, const char* name, int64_t B, int64_t V) {
    if (!offsets.given) return {nullptr, nullptr};
    const ItemLists found = {checked_offsets(offsets, "offsets", B, items.size),
                             items.of<const int64_t>(name, {items.size})};
    check_items(name, found.items, items.size, V);
    return found;
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
    // None stands for no bias, nothing seen and nothing added.
    m.def(
        "target_ranks",
        [](const Span& h, const Span& table, const Span& bias, const Span& targets, const Span& seen_offsets,
           const Span& seen_items, const Span& added_offsets, const Span& added_items, const Span& added_terms,
           const Span& greater, const Span& equal, const Span& nonfinite, int64_t B, int64_t V, int64_t D) {
            const ItemLists seen = lists(seen_offsets, seen_items, "seen items", B, V);
            const ItemLists added = lists(added_offsets, added_items, "added items", B, V);
            const RankCounts counts = {greater.of<int64_t>("greater", {B}), equal.of<int64_t>("equal", {B}),
                                       nonfinite.of<int64_t>("nonfinite", {B})};
            const auto* target = targets.of<const int64_t>("targets", {B});
            const auto run = [&](auto kernel, auto* states) {
                using T = std::remove_const_t<std::remove_pointer_t<decltype(states)>>;
                const RankProblem<T> problem{
                    states,
                    table.of<const T>("table", {V, D}),
                    bias.maybe<const T>("bias", {V}),
                    target,
                    seen,
                    added,
                    added.offsets == nullptr ? nullptr : added_terms.of<const T>("added terms", {added_items.size}),
                    B,
                    V,
                    D};
                const py::gil_scoped_release release;
                check_items("targets", target, B, V);
                check_rising(added, B);
                rank(kernel, problem, counts);
            };
            if (h.is_wide<double, float>("h")) {
                run(METAREC_DISPATCH(target_ranks_f64), h.of<const double>("h", {B, D}));
            } else {
                run(METAREC_DISPATCH(target_ranks_f32), h.of<const float>("h", {B, D}));
            }
        },
        py::arg("h"), py::arg("table"), py::arg("bias"), py::arg("targets"), py::arg("seen_offsets"),
        py::arg("seen_items"), py::arg("added_offsets"), py::arg("added_items"), py::arg("added_terms"),
        py::arg("greater"), py::arg("equal"), py::arg("nonfinite"), py::kw_only(), py::arg("B"), py::arg("V"),
        py::arg("D"));
}

}  // namespace metarec
