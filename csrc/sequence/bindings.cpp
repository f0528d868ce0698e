#include "core/bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "sequence/gather_cooccurrence.h"
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

// The tensors that logits come from, and the target that marks a row left out. bias: None for none.
LinearLogits logits(const Span& h, const Span& table, const Span& targets, const Span& bias, int64_t T, int64_t V,
                    int64_t D, int64_t ignored) {
    const auto* target = targets.of<const int64_t>("targets", {T});
    for (int64_t t = 0; t < T; ++t) {  // a target is an address within the table
        if (target[t] != ignored && (target[t] < 0 || target[t] >= V)) {
            throw std::invalid_argument("targets must lie in [0, " + std::to_string(V) + "), the rows of table, got " +
                                        std::to_string(target[t]) + " at position " + std::to_string(t));
        }
    }
    return {h.of<const float>("h", {T, D}),
            table.of<const float>("table", {V, D}),
            target,
            bias.maybe<const float>("bias", {V}),
            T,
            V,
            D,
            ignored};
}

// A tensor in the shape of each input of the logits; None for gradients that are not needed.
struct Gradients {
    Span h, table, bias;
    LinearGradients of(const LinearLogits& x) const {
        return {h.maybe<float>("gradient of h", {x.T, x.D}), table.maybe<float>("gradient of table", {x.V, x.D}),
                bias.maybe<float>("gradient of bias", {x.V})};
    }
};

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
CooccurrenceGraph cooccurrence_graph(const Span& offsets, const Span& items, const Span& values, int64_t V,
                                     int64_t relations) {
    const auto* item = items.of<const int32_t>("graph items", {items.size});
    check_at_least("relations", relations, 0);
    const auto* at = checked_offsets(offsets, "graph offsets", V, items.size);
    check_items(item, items.size, V, "graph items");
    return {at, item, values.of<const float>("graph values", {items.size, relations}), V, relations};
}

// The candidates of some histories: where those of each begin is known first, so that the caller can make room.
struct CooccurrencePlan {
    CooccurrencePlan(const CooccurrenceGraph& graph, const Span& offsets, const Span& items,
                     std::vector<int64_t> age_bounds, int64_t B)
        : graph(graph), ages(std::move(age_bounds)) {
        histories = {checked_offsets(offsets, "offsets", B, items.size), items.of<const int32_t>("items", {items.size}),
                     B};
        check_items(histories.items, items.size, graph.V, "items");
        bool rising = ages.size() > 1 && ages[0] == 0;
        for (size_t g = 1; g < ages.size(); ++g) rising = rising && ages[g - 1] < ages[g];
        if (!rising) throw std::invalid_argument("ages must rise from 0 and name one group at least");
        packed.resize(B + 1);
        plan_cooccurrence(graph, histories, by_age(), packed.data());
    }
    AgeGroups by_age() const { return {ages.data(), static_cast<int64_t>(ages.size()) - 1}; }

    const CooccurrenceGraph& graph;
    Histories histories;
    std::vector<int64_t> ages, packed;
};

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
        [](const Span& a, const Span& u, const Span& offsets, const Span& h, int64_t segments, int64_t rows,
           int64_t width, bool reverse) {
            const auto* at = checked_offsets(offsets, "offsets", segments, rows);
            const auto run = [&](auto kernel, const auto* factor, const auto* input, auto* out) {
                const py::gil_scoped_release release;
                kernel(factor, input, at, out, segments, width, reverse);
            };
            if (u.is_wide<double, float>("u")) {
                run(METAREC_DISPATCH(linear_scan_f64), a.of<const double>("a", {2, width}),
                    u.of<const double>("u", {rows, 2, width}), h.of<double>("h", {rows, 2, width}));
            } else {
                run(METAREC_DISPATCH(linear_scan_f32), a.of<const float>("a", {2, width}),
                    u.of<const float>("u", {rows, 2, width}), h.of<float>("h", {rows, 2, width}));
            }
        },
        py::arg("a"), py::arg("u"), py::arg("offsets"), py::arg("h"), py::kw_only(), py::arg("segments"),
        py::arg("rows"), py::arg("width"), py::arg("reverse"));
    m.def(
        "linear_scan_backward",
        [](const Span& a, const Span& h, const Span& grad_h, const Span& offsets, const Span& grad_a,
           const Span& grad_u, int64_t segments, int64_t rows, int64_t width, bool reverse) {
            const auto* at = checked_offsets(offsets, "offsets", segments, rows);
            const auto run = [&](auto kernel, const auto* factor, const auto* states, const auto* grad, auto* to_a,
                                 auto* to_u) {
                using Value = std::remove_pointer_t<decltype(to_a)>;
                const py::gil_scoped_release release;
                std::vector<Value> partial(kScanGroups * 2 * width);
                kernel(factor, states, grad, at, to_a, to_u, partial.data(), segments, width, reverse);
            };
            if (h.is_wide<double, float>("h")) {
                run(METAREC_DISPATCH(linear_scan_backward_f64), a.of<const double>("a", {2, width}),
                    h.of<const double>("h", {rows, 2, width}), grad_h.of<const double>("grad_h", {rows, 2, width}),
                    grad_a.of<double>("grad_a", {2, width}), grad_u.of<double>("grad_u", {rows, 2, width}));
            } else {
                run(METAREC_DISPATCH(linear_scan_backward_f32), a.of<const float>("a", {2, width}),
                    h.of<const float>("h", {rows, 2, width}), grad_h.of<const float>("grad_h", {rows, 2, width}),
                    grad_a.of<float>("grad_a", {2, width}), grad_u.of<float>("grad_u", {rows, 2, width}));
            }
        },
        py::arg("a"), py::arg("h"), py::arg("grad_h"), py::arg("offsets"), py::arg("grad_a"), py::arg("grad_u"),
        py::kw_only(), py::arg("segments"), py::arg("rows"), py::arg("width"), py::arg("reverse"));

    py::class_<CooccurrenceGraph>(m, "CooccurrenceGraph")
        .def(py::init(&cooccurrence_graph), py::arg("offsets"), py::arg("items"), py::arg("values"), py::kw_only(),
             py::arg("V"), py::arg("relations"));
    py::class_<CooccurrencePlan>(m, "CooccurrencePlan")
        .def(py::init<const CooccurrenceGraph&, const Span&, const Span&, std::vector<int64_t>, int64_t>(),
             py::call_guard<py::gil_scoped_release>(), py::keep_alive<1, 2>(), py::arg("graph"), py::arg("offsets"),
             py::arg("items"), py::kw_only(), py::arg("ages"), py::arg("B"))
        .def_property_readonly("candidates", [](const CooccurrencePlan& plan) { return plan.packed.back(); })
        .def(
            "gather",
            [](const CooccurrencePlan& plan, const Span& packed, const Span& candidates, const Span& features) {
                const CooccurrenceGraph& graph = plan.graph;
                const int64_t N = plan.packed.back(), columns = plan.by_age().groups * graph.relations + 1;
                auto* offsets = packed.of<int64_t>("packed", {plan.histories.B + 1});
                auto* items = candidates.of<int64_t>("candidates", {N});
                auto* values = features.of<float>("features", {N, columns});
                const py::gil_scoped_release release;
                std::copy(plan.packed.begin(), plan.packed.end(), offsets);
                list_candidates(graph, plan.histories, plan.by_age(), plan.packed.data(), items);
                const int threads = threads_for(N * columns);
                std::vector<int32_t> places(threads * graph.V, -1);
                METAREC_DISPATCH(gather_cooccurrence)
                (graph, plan.histories, plan.by_age(), plan.packed.data(), items, {places.data(), threads}, values);
            },
            py::arg("packed"), py::arg("candidates"), py::arg("features"));
    py::class_<LinearLogits>(m, "LinearLogits")
        .def(py::init(&logits), py::arg("h"), py::arg("table"), py::arg("targets"), py::arg("bias"), py::kw_only(),
             py::arg("T"), py::arg("V"), py::arg("D"), py::arg("ignored"));
    py::class_<Gradients>(m, "LinearGradients")
        .def(py::init([](const Span& h, const Span& table, const Span& bias) { return Gradients{h, table, bias}; }),
             py::arg("h"), py::arg("table"), py::arg("bias"));
    m.def(
        "linear_cross_entropy_forward",
        [](const LinearLogits& x, const Span& loss, const Span& lse) {
            auto *to_loss = loss.of<float>("loss", {x.T}), *to_lse = lse.of<float>("lse", {x.T});
            const py::gil_scoped_release release;
            METAREC_DISPATCH(linear_cross_entropy_forward)
            (x, to_loss, to_lse, allocate(x, LinearPass::forward).get());
        },
        py::arg("x"), py::arg("loss"), py::arg("lse"));
    m.def(
        "linear_cross_entropy_backward",
        [](const LinearLogits& x, const Span& lse, const Span& grad, const Gradients& out) {
            const auto *of_lse = lse.of<const float>("lse", {x.T}), *of_loss = grad.of<const float>("grad", {x.T});
            const LinearGradients to = out.of(x);
            const py::gil_scoped_release release;
            METAREC_DISPATCH(linear_cross_entropy_backward)
            (x, of_lse, of_loss, to, allocate(x, LinearPass::backward).get());
        },
        py::arg("x"), py::arg("lse"), py::arg("grad"), py::arg("out"));
    m.def(
        "linear_cross_entropy_sum",
        [](const LinearLogits& x, const Span& weight, const Span& total, const Span& loss, const Span& lse,
           const Gradients& out) {
            const auto* of_row = weight.of<const float>("weight", {x.T});
            auto *to_total = total.of<float>("total", {}), *to_loss = loss.of<float>("loss", {x.T}),
                 *to_lse = lse.of<float>("lse", {x.T});
            const LinearGradients to = out.of(x);
            const py::gil_scoped_release release;
            METAREC_DISPATCH(linear_cross_entropy_sum)
            (x, of_row, to_total, to_loss, to_lse, to, allocate(x, LinearPass::sum).get());
        },
        py::arg("x"), py::arg("weight"), py::arg("total"), py::arg("loss"), py::arg("lse"), py::arg("out"));
    m.def(
        "linear_cross_entropy_double_backward",
        [](const LinearLogits& x, const Span& lse, const Span& grad, const Gradients& by, const Span& grad_grad,
           const Gradients& out) {
            const auto *of_lse = lse.of<const float>("lse", {x.T}), *of_loss = grad.of<const float>("grad", {x.T});
            auto* to_grad = grad_grad.of<float>("grad_grad", {x.T});
            const LinearGradients cotangent = by.of(x), to = out.of(x);
            const py::gil_scoped_release release;
            METAREC_DISPATCH(linear_cross_entropy_double_backward)
            (x, of_lse, of_loss, cotangent, to_grad, to, allocate(x, LinearPass::double_backward).get());
        },
        py::arg("x"), py::arg("lse"), py::arg("grad"), py::arg("by"), py::arg("grad_grad"), py::arg("out"));
}

}  // namespace metarec
