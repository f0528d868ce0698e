#include <pybind11/stl.h>

#include <array>
#include <map>
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

RowBounds view(const std::map<std::string, Span>& state, int64_t heads, int64_t rows, int64_t codes, int64_t dim,
               int64_t list) {
    if (heads < 1 || codes < 1 || dim < 1 || list < 1 || list > codes) {
        throw std::invalid_argument("bounds must be of a codebook and of 1 to " + std::to_string(codes) +
                                    " neighbours, got heads " + std::to_string(heads) + ", dim " + std::to_string(dim) +
                                    ", neighbours " + std::to_string(list));
    }
    const auto at = [&](const char* name) { return state.count(name) ? state.at(name) : Span(); };
    RowBounds bounds = {};
    bounds.heads = heads, bounds.rows = rows, bounds.codes = codes, bounds.dim = dim, bounds.list = list;
    bounds.records = at("records").of<int32_t>("records", {rows, heads, 6 + dim + 2 * list});
    bounds.path = at("path").of<double>("path", {heads, codes});
    bounds.sweep = at("sweep").of<double>("sweep", {heads});
    bounds.jumped = at("jumped").of<int32_t>("jumped", {heads, codes});
    bounds.recent = at("recent").of<int32_t>("recent", {heads, codes});
    bounds.recent_count = at("recent_count").of<int64_t>("recent_count", {heads});
    bounds.previous = at("previous").of<float>("previous", {heads, codes, dim});
    for (int64_t h = 0; h < heads; ++h) {
        bool within = bounds.recent_count[h] >= 0 && bounds.recent_count[h] <= codes;
        for (int64_t j = 0; within && j < bounds.recent_count[h]; ++j) {
            const int32_t k = bounds.recent[h * codes + j];
            within = k >= 0 && k < codes;
        }
        if (!within) throw std::invalid_argument("bounds name recent codes that the codebook does not have");
    }
    return bounds;
}

// Codes that a record names are addresses within the codebook.
void check_record(const RowBounds& bounds, int64_t row) {
    const int64_t words = 6 + bounds.dim + 2 * bounds.list;
    for (int64_t h = 0; h < bounds.heads; ++h) {
        const int32_t* record = bounds.records + (row * bounds.heads + h) * words;
        if (record[0] < 0) continue;  // never searched
        bool within = record[1] >= 0 && record[1] <= bounds.list;
        for (int64_t j = 0; within && j < record[1]; ++j) {
            const int32_t k = record[6 + bounds.dim + bounds.list + j];
            within = k >= 0 && k < bounds.codes;
        }
        if (!within) {
            throw std::invalid_argument("bounds of row " + std::to_string(row) +
                                        " name codes that the codebook does not have");
        }
    }
}

}  // namespace

void bind_bounded_lookup(py::module_& m) {
    // "moved", "still" or "not finite": what the codes did since bounds.previous
    m.def(
        "follow_codes",
        [](const std::map<std::string, Span>& state, const Span& codebook, int64_t heads, int64_t rows, int64_t codes,
           int64_t dim, int64_t list, int64_t next_version) {
            const RowBounds bounds = view(state, heads, rows, codes, dim, list);
            const auto* now = codebook.of<const float>("codebook", {heads, codes, dim});
            const py::gil_scoped_release release;
            std::vector<double> drift(heads * codes);
            if (!METAREC_DISPATCH(code_drift)(bounds, now, drift.data())) return "not finite";
            return advance(bounds, drift, next_version) ? "moved" : "still";
        },
        py::arg("state"), py::arg("codebook"), py::kw_only(), py::arg("heads"), py::arg("rows"), py::arg("codes"),
        py::arg("dim"), py::arg("list"), py::arg("next_version"));
    // returns the Work it took
    m.def(
        "bounded_lookup",
        [](const std::map<std::string, Span>& state, const Span& ids, const Span& x, const Span& codebook,
           const Span& indices, int64_t heads, int64_t rows, int64_t codes, int64_t dim, int64_t list, int64_t count,
           int64_t version) {
            const RowBounds bounds = view(state, heads, rows, codes, dim, list);
            const auto* id = ids.of<const int64_t>("ids", {count});
            const auto* rows_in = x.of<const float>("x", {heads, count, dim});
            const auto* codes_in = codebook.of<const float>("codebook", {heads, codes, dim});
            auto* out = indices.of<int64_t>("indices", {heads, count});
            const py::gil_scoped_release release;
            for (int64_t n = 0; n < count; ++n) {
                if (id[n] < 0 || id[n] >= rows) {
                    throw std::invalid_argument("ids must be in 0.." + std::to_string(rows - 1) + ", got " +
                                                std::to_string(id[n]));
                }
                check_record(bounds, id[n]);
            }
            int threads = 1;
#ifdef _OPENMP
            if (heads * count > 1 << 9) threads = omp_get_max_threads();
#endif
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
