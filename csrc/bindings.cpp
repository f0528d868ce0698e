#include "core/bindings.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "core/fma_peak.h"
#include "core/isa.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    using namespace metarec;
    m.def("active_isa", [] { return std::string(isa_name(active_isa())); });
    m.def("supported_isas", [] {
        std::vector<std::string> names;
        for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_vnni}) {
            if (isa_supported(isa)) names.emplace_back(isa_name(isa));
        }
        return names;
    });
    m.def("max_threads", [] {
#ifdef _OPENMP
        return omp_get_max_threads();
#else
        return 1;
#endif
    });
    bind_evaluation(m);
    m.def(
        "fma_peak", [](int64_t steps) { return METAREC_DISPATCH(fma_peak)(steps); },
        py::call_guard<py::gil_scoped_release>());
    bind_sampler(m);
    bind_sequence(m);
    bind_train(m);
    bind_vq(m);
    bind_bounded_lookup(m);
}
