#include "core/bindings.h"

#include "train/missed_steps.h"

namespace py = pybind11;

namespace metarec {

void bind_train(py::module_& m) {
    m.def(
        "missed_steps",
        [](uintptr_t p, uintptr_t exp_avg, uintptr_t exp_avg_sq, uintptr_t last, uintptr_t past, uintptr_t shrink,
           uintptr_t ids, int64_t V, int64_t rows, int64_t width, int64_t first, int64_t step, int64_t terms,
           int64_t window, int64_t start, double beta1, double beta2, double eps, bool is_double) {
            const MissedSteps missed{pointer<const int64_t>(ids),
                                     pointer<int64_t>(last),
                                     pointer<const double>(past),
                                     pointer<const double>(shrink),
                                     rows,
                                     width,
                                     first,
                                     step,
                                     terms,
                                     window,
                                     start,
                                     beta1,
                                     beta2,
                                     eps};
            // ids are addresses within the table, and what is last up to date is one within the past
            for (int64_t row = 0; row < rows; ++row) {
                const int64_t id = missed.ids == nullptr ? row : missed.ids[row];
                if (id < 0 || id >= V) {
                    throw std::invalid_argument("ids must lie in [0, " + std::to_string(V) + "), got " +
                                                std::to_string(id));
                }
                if (missed.last[id] < first || missed.last[id] > step) {
                    throw std::invalid_argument("last must lie in [" + std::to_string(first) + ", " +
                                                std::to_string(step) + "], got " + std::to_string(missed.last[id]) +
                                                " of row " + std::to_string(id));
                }
            }
            py::gil_scoped_release release;
            if (is_double) {
                METAREC_DISPATCH(missed_steps_f64)
                (missed, pointer<double>(p), pointer<double>(exp_avg), pointer<double>(exp_avg_sq));
            } else {
                METAREC_DISPATCH(missed_steps_f32)
                (missed, pointer<float>(p), pointer<float>(exp_avg), pointer<float>(exp_avg_sq));
            }
        },
        py::arg("p"), py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("last"), py::arg("past"), py::arg("shrink"),
        py::arg("ids"), py::kw_only(), py::arg("V"), py::arg("rows"), py::arg("width"), py::arg("first"),
        py::arg("step"), py::arg("terms"), py::arg("window"), py::arg("start"), py::arg("beta1"), py::arg("beta2"),
        py::arg("eps"), py::arg("is_double"));
}

}  // namespace metarec
