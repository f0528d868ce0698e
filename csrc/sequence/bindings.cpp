#include "core/bindings.h"

#include <cstdlib>
#include <memory>
#include <new>

#include "sequence/linear_cross_entropy.h"
#include "sequence/linear_scan.h"

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

// A target is an address within the table.
void check_targets(const int64_t* targets, int64_t T, int64_t V) {
    for (int64_t t = 0; t < T; ++t) {
        if (targets[t] < 0 || targets[t] >= V) {
            throw std::invalid_argument("targets must lie in [0, " + std::to_string(V) + "), the rows of table, got " +
                                        std::to_string(targets[t]) + " at position " + std::to_string(t));
        }
    }
}

}  // namespace

void bind_sequence(py::module_& m) {
    m.def(
        "linear_scan",
        [](uintptr_t a, uintptr_t u, uintptr_t offsets, uintptr_t h, int64_t segments, int64_t rows, int64_t width,
           bool reverse, bool is_double) {
            check_offsets(pointer<const int64_t>(offsets), segments, rows);
            py::gil_scoped_release release;
            if (is_double) {
                METAREC_DISPATCH(linear_scan_f64)
                (pointer<const double>(a), pointer<const double>(u), pointer<const int64_t>(offsets),
                 pointer<double>(h), segments, width, reverse);
            } else {
                METAREC_DISPATCH(linear_scan_f32)
                (pointer<const float>(a), pointer<const float>(u), pointer<const int64_t>(offsets), pointer<float>(h),
                 segments, width, reverse);
            }
        },
        py::arg("a"), py::arg("u"), py::arg("offsets"), py::arg("h"), py::kw_only(), py::arg("segments"),
        py::arg("rows"), py::arg("width"), py::arg("reverse"), py::arg("is_double"));

    // Null addresses stand for no bias and for gradients that nobody asked for.
    m.def(
        "linear_cross_entropy_forward",
        [](uintptr_t h, uintptr_t table, uintptr_t targets, uintptr_t bias, uintptr_t loss, uintptr_t lse, int64_t T,
           int64_t V, int64_t D) {
            check_targets(pointer<const int64_t>(targets), T, V);
            py::gil_scoped_release release;
            const Scratch scratch = allocate(METAREC_DISPATCH(linear_cross_entropy_scratch)(T, V, D));
            METAREC_DISPATCH(linear_cross_entropy_forward)
            (pointer<const float>(h), pointer<const float>(table), pointer<const int64_t>(targets),
             pointer<const float>(bias), pointer<float>(loss), pointer<float>(lse), scratch.get(), T, V, D);
        },
        py::arg("h"), py::arg("table"), py::arg("targets"), py::arg("bias"), py::arg("loss"), py::arg("lse"),
        py::kw_only(), py::arg("T"), py::arg("V"), py::arg("D"));
    m.def(
        "linear_cross_entropy_backward",
        [](uintptr_t grad, uintptr_t h, uintptr_t table, uintptr_t targets, uintptr_t bias, uintptr_t lse,
           uintptr_t grad_h, uintptr_t grad_table, uintptr_t grad_bias, int64_t T, int64_t V, int64_t D) {
            check_targets(pointer<const int64_t>(targets), T, V);
            py::gil_scoped_release release;
            const Scratch scratch = allocate(METAREC_DISPATCH(linear_cross_entropy_scratch)(T, V, D));
            METAREC_DISPATCH(linear_cross_entropy_backward)
            (pointer<const float>(grad), pointer<const float>(h), pointer<const float>(table),
             pointer<const int64_t>(targets), pointer<const float>(bias), pointer<const float>(lse),
             pointer<float>(grad_h), pointer<float>(grad_table), pointer<float>(grad_bias), scratch.get(), T, V, D);
        },
        py::arg("grad"), py::arg("h"), py::arg("table"), py::arg("targets"), py::arg("bias"), py::arg("lse"),
        py::arg("grad_h"), py::arg("grad_table"), py::arg("grad_bias"), py::kw_only(), py::arg("T"), py::arg("V"),
        py::arg("D"));
    m.def(
        "linear_cross_entropy_double_backward",
        [](uintptr_t grad, uintptr_t h, uintptr_t table, uintptr_t targets, uintptr_t bias, uintptr_t lse, uintptr_t u,
           uintptr_t w, uintptr_t c, uintptr_t grad_grad, uintptr_t grad_h, uintptr_t grad_table, uintptr_t grad_bias,
           int64_t T, int64_t V, int64_t D) {
            check_targets(pointer<const int64_t>(targets), T, V);
            py::gil_scoped_release release;
            const Scratch scratch = allocate(METAREC_DISPATCH(linear_cross_entropy_scratch)(T, V, D));
            METAREC_DISPATCH(linear_cross_entropy_double_backward)
            (pointer<const float>(grad), pointer<const float>(h), pointer<const float>(table),
             pointer<const int64_t>(targets), pointer<const float>(bias), pointer<const float>(lse),
             pointer<const float>(u), pointer<const float>(w), pointer<const float>(c), pointer<float>(grad_grad),
             pointer<float>(grad_h), pointer<float>(grad_table), pointer<float>(grad_bias), scratch.get(), T, V, D);
        },
        py::arg("grad"), py::arg("h"), py::arg("table"), py::arg("targets"), py::arg("bias"), py::arg("lse"),
        py::arg("u"), py::arg("w"), py::arg("c"), py::arg("grad_grad"), py::arg("grad_h"), py::arg("grad_table"),
        py::arg("grad_bias"), py::kw_only(), py::arg("T"), py::arg("V"), py::arg("D"));
}

}  // namespace metarec
