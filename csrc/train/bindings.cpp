#include "core/bindings.h"

#include "train/missed_steps.h"

namespace py = pybind11;

namespace metarec {

void bind_train(py::module_& m) {
    m.def(
        "missed_steps",
        [](const Span& p, const Span& exp_avg, const Span& exp_avg_sq, const Span& last, const Span& past,
           const Span& shrink, const Span& ids, int64_t V, int64_t rows, int64_t width, int64_t first, int64_t step,
           int64_t terms, int64_t window, int64_t start, double beta1, double beta2, double eps) {
            check_at_least("step", step, first);
            check_at_least("terms", terms, 0);
            check_at_least("V", V, ids.given ? 0 : rows);
            const MissedSteps missed{ids.maybe<const int64_t>("ids", {rows}),
                                     last.of<int64_t>("last", {V}),
                                     past.of<const double>("past", {step - first + 1, 3 + terms}),
                                     shrink.of<const double>("shrink", {step - first + 1, 3}),
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
            const auto run = [&](auto kernel, auto* at, auto* first_moment, auto* second_moment) {
                const py::gil_scoped_release release;
                kernel(missed, at, first_moment, second_moment);
            };
            if (p.is_wide<double, float>("p")) {
                run(METAREC_DISPATCH(missed_steps_f64), p.of<double>("p", {V, width}),
                    exp_avg.of<double>("exp_avg", {V, width}), exp_avg_sq.of<double>("exp_avg_sq", {V, width}));
            } else {
                run(METAREC_DISPATCH(missed_steps_f32), p.of<float>("p", {V, width}),
                    exp_avg.of<float>("exp_avg", {V, width}), exp_avg_sq.of<float>("exp_avg_sq", {V, width}));
            }
        },
        py::arg("p"), py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("last"), py::arg("past"), py::arg("shrink"),
        py::arg("ids"), py::kw_only(), py::arg("V"), py::arg("rows"), py::arg("width"), py::arg("first"),
        py::arg("step"), py::arg("terms"), py::arg("window"), py::arg("start"), py::arg("beta1"), py::arg("beta2"),
        py::arg("eps"));
}

}  // namespace metarec
