#include "core/bindings.h"

#include "sequence/linear_scan.h"

namespace py = pybind11;

namespace metarec {

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
}

}  // namespace metarec
