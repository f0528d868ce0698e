#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "core/bindings.h"
#include "vq/bounded_lookup.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;

namespace metarec {
namespace {

// A step this many times the mean of its head is a jump; by Markov's inequality few codes can jump at a time.
constexpr double kJump = 8;
constexpr double kUp = 1 + 0x1p-51;  // undoes the rounding of the operations before it

// Take the steps `drift` of the codes into the bounds. True if any code moved.
bool advance(const RowBounds& bounds, const std::vector<double>& drift, int64_t version) {
    const int64_t K = bounds.codes;
    bool moved = false;
    for (int64_t h = 0; h < bounds.heads; ++h) {
        double total = 0, longest = 0;
        for (int64_t k = 0; k < K; ++k) total += drift[h * K + k];
        if (total == 0) continue;
        moved = true;
        std::vector<int32_t> recent;
        for (int64_t k = 0; k < K; ++k) {
            const double step = drift[h * K + k];
            double& path = bounds.path[h * K + k];
            path = (path + step) * kUp;
            if (step * static_cast<double>(K) > kJump * total) {
                recent.push_back(static_cast<int32_t>(k));
            } else if (step > longest) {
                longest = step;
            }
        }
        bounds.sweep[h] = (bounds.sweep[h] + longest) * kUp;
        if (recent.empty()) continue;
        for (int32_t k : recent) bounds.jumped[h * K + k] = static_cast<int32_t>(version);
        for (int64_t j = 0; j < bounds.recent_count[h]; ++j) {
            const int32_t k = bounds.recent[h * K + j];
            if (bounds.jumped[h * K + k] != version) recent.push_back(k);
        }
        for (size_t j = 0; j < recent.size(); ++j) bounds.recent[h * K + j] = recent[j];
        bounds.recent_count[h] = static_cast<int64_t>(recent.size());
    }
    return moved;
}

RowBounds view(const py::dict& state, int64_t heads, int64_t rows, int64_t codes, int64_t dim, int64_t list) {
    auto at = [&](const char* name) { return state[name].cast<uintptr_t>(); };
    RowBounds bounds = {};
    bounds.heads = heads, bounds.rows = rows, bounds.codes = codes, bounds.dim = dim, bounds.list = list;
    bounds.records = pointer<int32_t>(at("records"));
    bounds.path = pointer<double>(at("path"));
    bounds.sweep = pointer<double>(at("sweep"));
    bounds.jumped = pointer<int32_t>(at("jumped"));
    bounds.recent = pointer<int32_t>(at("recent"));
    bounds.recent_count = pointer<int64_t>(at("recent_count"));
    bounds.previous = pointer<float>(at("previous"));
    return bounds;
}

}  // namespace

void bind_bounded_lookup(py::module_& m) {
    // "moved", "still" or "not finite": what the codes did since bounds.previous
    m.def(
        "follow_codes",
        [](const py::dict& state, uintptr_t codebook, int64_t heads, int64_t rows, int64_t codes, int64_t dim,
           int64_t list, int64_t next_version) {
            const RowBounds bounds = view(state, heads, rows, codes, dim, list);
            py::gil_scoped_release release;
            std::vector<double> drift(heads * codes);
            if (!METAREC_DISPATCH(code_drift)(bounds, pointer<const float>(codebook), drift.data())) {
                return "not finite";
            }
            return advance(bounds, drift, next_version) ? "moved" : "still";
        },
        py::arg("state"), py::arg("codebook"), py::kw_only(), py::arg("heads"), py::arg("rows"), py::arg("codes"),
        py::arg("dim"), py::arg("list"), py::arg("next_version"));
    // returns the Work it took
    m.def(
        "bounded_lookup",
        [](const py::dict& state, uintptr_t ids, uintptr_t x, uintptr_t codebook, uintptr_t indices, int64_t heads,
           int64_t rows, int64_t codes, int64_t dim, int64_t list, int64_t count, int64_t version) {
            const RowBounds bounds = view(state, heads, rows, codes, dim, list);
            py::gil_scoped_release release;
            const int64_t* id = pointer<const int64_t>(ids);
            for (int64_t n = 0; n < count; ++n) {
                if (id[n] < 0 || id[n] >= rows) {
                    throw std::invalid_argument("ids must be in 0.." + std::to_string(rows - 1) + ", got " +
                                                std::to_string(id[n]));
                }
            }
            int threads = 1;
#ifdef _OPENMP
            if (heads * count > 1 << 9) threads = omp_get_max_threads();
#endif
            const float *rows_in = pointer<const float>(x), *codes_in = pointer<const float>(codebook);
            int64_t* out = pointer<int64_t>(indices);
            Work work = {0, 0, 0, 0};
            std::vector<double> scratch(threads * METAREC_DISPATCH(bounded_lookup_scratch)(bounds));
            const int64_t open = METAREC_DISPATCH(lookup_by_bounds)(bounds, id, rows_in, codes_in, count, version,
                                                                    threads, scratch.data(), out, &work);
            if (open > 0) {
                std::vector<float> packed(heads * METAREC_DISPATCH(packed_codes)(codes) * dim);
                METAREC_DISPATCH(search_the_rest)
                (bounds, id, rows_in, codes_in, count, version, threads, packed.data(), scratch.data(), out, &work);
            }
            return std::array<int64_t, 4>{work.distances, work.proven, work.searched, work.failed};
        },
        py::arg("state"), py::arg("ids"), py::arg("x"), py::arg("codebook"), py::arg("indices"), py::kw_only(),
        py::arg("heads"), py::arg("rows"), py::arg("codes"), py::arg("dim"), py::arg("list"), py::arg("count"),
        py::arg("version"));
}

}  // namespace metarec
