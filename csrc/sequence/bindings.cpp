#include "core/bindings.h"

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "sequence/gather_evidence.h"
#include "sequence/linear_cross_entropy.h"
#include "sequence/linear_scan.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;

namespace metarec {
namespace {

using Scratch = std::unique_ptr<float, decltype(&std::free)>;

// Memory of one call, aligned to a cache line.
Scratch allocate(int64_t floats) {
    void* memory = std::aligned_alloc(64, (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64);
    if (memory == nullptr) throw std::bad_alloc();
    return Scratch(static_cast<float*>(memory), &std::free);
}

// The tensors that logits come from, as Python hands them over: addresses, sizes, and the target that marks a row left
// out. Null addresses stand for no bias and for gradients that nobody asked for.
LinearLogits logits(uintptr_t h, uintptr_t table, uintptr_t targets, uintptr_t bias, int64_t T, int64_t V, int64_t D,
                    int64_t ignored) {
    const auto* target = pointer<const int64_t>(targets);
    for (int64_t t = 0; t < T; ++t) {  // a target is an address within the table
        if (target[t] != ignored && (target[t] < 0 || target[t] >= V)) {
            throw std::invalid_argument("targets must lie in [0, " + std::to_string(V) + "), the rows of table, got " +
                                        std::to_string(target[t]) + " at position " + std::to_string(t));
        }
    }
    return {pointer<const float>(h), pointer<const float>(table), target, pointer<const float>(bias), T, V, D, ignored};
}

LinearGradients gradients(uintptr_t h, uintptr_t table, uintptr_t bias) {
    return {pointer<float>(h), pointer<float>(table), pointer<float>(bias)};
}

void check_items(const int32_t* items, int64_t count, int64_t V, const char* name) {
    for (int64_t i = 0; i < count; ++i) {
        if (items[i] < 0 || items[i] >= V) {
            throw std::invalid_argument(std::string(name) + " must lie in [0, " + std::to_string(V) +
                                        "), the rows of the graph, got " + std::to_string(items[i]) + " at position " +
                                        std::to_string(i));
        }
    }
}

// Checked once, as items are addresses: a graph serves many calls.
EvidenceGraph evidence_graph(uintptr_t offsets, uintptr_t items, uintptr_t values, int64_t V, int64_t entries,
                             int64_t relations) {
    check_offsets(pointer<const int64_t>(offsets), V, entries);
    check_items(pointer<const int32_t>(items), entries, V, "graph items");
    return {pointer<const int64_t>(offsets), pointer<const int32_t>(items), pointer<const float>(values), V, relations};
}

Histories histories(const EvidenceGraph& graph, uintptr_t offsets, uintptr_t items, int64_t B, int64_t events) {
    check_offsets(pointer<const int64_t>(offsets), B, events);
    check_items(pointer<const int32_t>(items), events, graph.V, "items");
    return {pointer<const int64_t>(offsets), pointer<const int32_t>(items), B};
}

int threads_for(int64_t cells) {
#ifdef _OPENMP
    if (cells > 1 << 20) return omp_get_max_threads();
#endif
    return 1;
}

Scratch allocate(const LinearLogits& x, LinearPass pass) {
    return allocate(METAREC_DISPATCH(linear_cross_entropy_scratch)(x, pass));
}

}  // namespace

void bind_sequence(py::module_& m) {
    m.def(
        "linear_scan",
        [](uintptr_t a, uintptr_t u, uintptr_t offsets, uintptr_t h, int64_t segments, int64_t rows, int64_t width,
           bool reverse, bool is_double) {
            const auto* at = pointer<const int64_t>(offsets);
            check_offsets(at, segments, rows);
            const py::gil_scoped_release release;
            if (is_double) {
                METAREC_DISPATCH(linear_scan_f64)
                (pointer<const double>(a), pointer<const double>(u), at, pointer<double>(h), segments, width, reverse);
            } else {
                METAREC_DISPATCH(linear_scan_f32)
                (pointer<const float>(a), pointer<const float>(u), at, pointer<float>(h), segments, width, reverse);
            }
        },
        py::arg("a"), py::arg("u"), py::arg("offsets"), py::arg("h"), py::kw_only(), py::arg("segments"),
        py::arg("rows"), py::arg("width"), py::arg("reverse"), py::arg("is_double"));
    m.def(
        "linear_scan_backward",
        [](uintptr_t a, uintptr_t h, uintptr_t grad_h, uintptr_t offsets, uintptr_t grad_a, uintptr_t grad_u,
           int64_t segments, int64_t rows, int64_t width, bool reverse, bool is_double) {
            const auto* at = pointer<const int64_t>(offsets);
            check_offsets(at, segments, rows);
            const py::gil_scoped_release release;
            const int64_t partial = kScanGroups * 2 * width;
            if (is_double) {
                METAREC_DISPATCH(linear_scan_backward_f64)
                (pointer<const double>(a), pointer<const double>(h), pointer<const double>(grad_h), at,
                 pointer<double>(grad_a), pointer<double>(grad_u), std::vector<double>(partial).data(), segments, width,
                 reverse);
            } else {
                METAREC_DISPATCH(linear_scan_backward_f32)
                (pointer<const float>(a), pointer<const float>(h), pointer<const float>(grad_h), at,
                 pointer<float>(grad_a), pointer<float>(grad_u), std::vector<float>(partial).data(), segments, width,
                 reverse);
            }
        },
        py::arg("a"), py::arg("h"), py::arg("grad_h"), py::arg("offsets"), py::arg("grad_a"), py::arg("grad_u"),
        py::kw_only(), py::arg("segments"), py::arg("rows"), py::arg("width"), py::arg("reverse"),
        py::arg("is_double"));

    py::class_<Histories>(m, "Histories")
        .def(py::init(&histories), py::arg("graph"), py::arg("offsets"), py::arg("items"), py::kw_only(), py::arg("B"),
             py::arg("events"));
    py::class_<EvidenceGraph>(m, "EvidenceGraph")
        .def(py::init(&evidence_graph), py::arg("offsets"), py::arg("items"), py::arg("values"), py::kw_only(),
             py::arg("V"), py::arg("entries"), py::arg("relations"))
        .def(
            "plan",
            [](const EvidenceGraph& graph, const Histories& histories, uintptr_t ages, int64_t groups,
               uintptr_t packed) {
                const py::gil_scoped_release release;
                plan_evidence(graph, histories, {pointer<const int64_t>(ages), groups}, pointer<int64_t>(packed));
                return pointer<int64_t>(packed)[histories.B];
            },
            py::arg("histories"), py::arg("ages"), py::arg("groups"), py::arg("packed"))
        .def(
            "gather",
            [](const EvidenceGraph& graph, const Histories& histories, uintptr_t ages, int64_t groups, uintptr_t packed,
               uintptr_t candidates, uintptr_t features) {
                const py::gil_scoped_release release;
                const AgeGroups by_age{pointer<const int64_t>(ages), groups};
                const auto* at = pointer<const int64_t>(packed);
                list_candidates(graph, histories, by_age, at, pointer<int64_t>(candidates));
                const int64_t cells = at[histories.B] * (groups * graph.relations + 1);
                const int threads = threads_for(cells);
                std::vector<int32_t> places(threads * graph.V, -1);
                METAREC_DISPATCH(gather_evidence)
                (graph, histories, by_age, at, pointer<const int64_t>(candidates), {places.data(), threads},
                 pointer<float>(features));
            },
            py::arg("histories"), py::arg("ages"), py::arg("groups"), py::arg("packed"), py::arg("candidates"),
            py::arg("features"));
    py::class_<LinearLogits>(m, "LinearLogits")
        .def(py::init(&logits), py::arg("h"), py::arg("table"), py::arg("targets"), py::arg("bias"), py::kw_only(),
             py::arg("T"), py::arg("V"), py::arg("D"), py::arg("ignored"));
    py::class_<LinearGradients>(m, "LinearGradients")
        .def(py::init(&gradients), py::arg("h"), py::arg("table"), py::arg("bias"));
    m.def(
        "linear_cross_entropy_forward",
        [](const LinearLogits& x, uintptr_t loss, uintptr_t lse) {
            const py::gil_scoped_release release;
            METAREC_DISPATCH(linear_cross_entropy_forward)
            (x, pointer<float>(loss), pointer<float>(lse), allocate(x, LinearPass::forward).get());
        },
        py::arg("x"), py::arg("loss"), py::arg("lse"));
    m.def(
        "linear_cross_entropy_backward",
        [](const LinearLogits& x, uintptr_t lse, uintptr_t grad, const LinearGradients& out) {
            const py::gil_scoped_release release;
            METAREC_DISPATCH(linear_cross_entropy_backward)
            (x, pointer<const float>(lse), pointer<const float>(grad), out, allocate(x, LinearPass::backward).get());
        },
        py::arg("x"), py::arg("lse"), py::arg("grad"), py::arg("out"));
    m.def(
        "linear_cross_entropy_sum",
        [](const LinearLogits& x, uintptr_t weight, uintptr_t total, uintptr_t loss, uintptr_t lse,
           const LinearGradients& out) {
            const py::gil_scoped_release release;
            METAREC_DISPATCH(linear_cross_entropy_sum)
            (x, pointer<const float>(weight), pointer<float>(total), pointer<float>(loss), pointer<float>(lse), out,
             allocate(x, LinearPass::sum).get());
        },
        py::arg("x"), py::arg("weight"), py::arg("total"), py::arg("loss"), py::arg("lse"), py::arg("out"));
    m.def(
        "linear_cross_entropy_double_backward",
        [](const LinearLogits& x, uintptr_t lse, uintptr_t grad, const LinearGradients& by, uintptr_t grad_grad,
           const LinearGradients& out) {
            const py::gil_scoped_release release;
            METAREC_DISPATCH(linear_cross_entropy_double_backward)
            (x, pointer<const float>(lse), pointer<const float>(grad), by, pointer<float>(grad_grad), out,
             allocate(x, LinearPass::double_backward).get());
        },
        py::arg("x"), py::arg("lse"), py::arg("grad"), py::arg("by"), py::arg("grad_grad"), py::arg("out"));
}

}  // namespace metarec
