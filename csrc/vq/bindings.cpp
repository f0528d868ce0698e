#include "core/bindings.h"

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "vq/backward.h"
#include "vq/exact.h"
#include "vq/nearest_codeword/nearest_codeword.h"
#include "vq/nearest_codeword/prepared_codebook.h"
#include "vq/statistics.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;

namespace metarec {
namespace {

int max_threads() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

Metric metric_of(const std::string& name) {
    if (name == "distance") return Metric::distance;
    if (name == "product") return Metric::product;
    throw std::invalid_argument("metric must be distance or product, got " + name);
}

void search(const float* x, const float* codebook, const SearchOutput& out, int64_t heads, int64_t rows, int64_t codes,
            int64_t dim, Metric metric) {
    if (codes > std::numeric_limits<int32_t>::max()) {
        throw std::invalid_argument("codebook must hold fewer than 2^31 codes, got " + std::to_string(codes));
    }
    if (heads * rows == 0) return;
    const int threads = heads * rows * codes * dim < 1 << 15 ? 1 : max_threads();
    auto run = [&](int bits, const SearchRows& of, const Unresolved* unresolved) {
        const PreparedCodebook prepared(codebook, heads, codes, dim, bits, metric);
        const AlignedMemory scratch = allocate_aligned(threads * METAREC_DISPATCH(search_scratch)(prepared.view()));
        METAREC_DISPATCH(nearest_codeword_f32)(prepared.view(), of, threads, scratch.get(), out, unresolved);
    };
    const int screen = METAREC_DISPATCH(screen_bits)(dim);
    if (screen == 32) {
        run(32, {x, rows, nullptr, nullptr}, nullptr);
        return;
    }
    const std::unique_ptr<int64_t[]> unresolved_rows(new int64_t[heads * rows]);
    std::vector<int64_t> unresolved_count(heads, 0);
    const Unresolved unresolved = {unresolved_rows.get(), unresolved_count.data()};
    run(screen, {x, rows, nullptr, nullptr}, &unresolved);
    if (std::any_of(unresolved_count.begin(), unresolved_count.end(), [](int64_t count) { return count > 0; })) {
        run(32, {x, rows, unresolved.rows, unresolved.count}, nullptr);
    }
}

constexpr int64_t kGroupRows = 512;

// Rows of x [H, rows, dim] by their code: counts [H, codes] and sums [H, codes, dim].
template <typename T>
void statistics(const T* x, const int64_t* indices, const T* weight, T* counts, T* sums, int64_t heads, int64_t rows,
                int64_t codes, int64_t dim) {
    const int64_t total = heads * rows, bins = heads * codes;
    std::vector<uint8_t> kept(total);
    if constexpr (sizeof(T) == 4) {
        METAREC_DISPATCH(finite_rows_f32)(x, total, dim, kept.data());
    } else {
        METAREC_DISPATCH(finite_rows_f64)(x, total, dim, kept.data());
    }

    // counting sort by (head, code), rows in order within each
    std::vector<int64_t> end(bins + 1, 0), order(total);
    for (int64_t i = 0; i < total; ++i) {
        const int64_t index = indices[i];
        if (index < -1 || index >= codes) {
            throw std::invalid_argument("indices must be in -1.." + std::to_string(codes - 1) + ", got " +
                                        std::to_string(index));
        }
        kept[i] = kept[i] && index >= 0;
        if (kept[i]) ++end[i / rows * codes + index + 1];
    }
    for (int64_t b = 0; b < bins; ++b) {
        counts[b] = weight == nullptr ? static_cast<T>(end[b + 1]) : 0;
        end[b + 1] += end[b];
    }
    for (int64_t i = 0; i < total; ++i) {
        if (!kept[i]) continue;
        const int64_t bin = i / rows * codes + indices[i];
        if (weight != nullptr) counts[bin] += weight[i];
        order[end[bin]++] = i;  // end[bin] starts where the bin does, and arrives at its end
    }

    // the first group of a code goes to its sum, further ones to `extra`, which is added in order
    std::vector<RowGroup> first(bins), more;
    std::vector<int64_t> extra_bin;
    for (int64_t b = 0; b < bins; ++b) {
        const int64_t begin = b == 0 ? 0 : end[b - 1];
        first[b] = {begin, std::min(begin + kGroupRows, end[b]), b};
        for (int64_t at = begin + kGroupRows; at < end[b]; at += kGroupRows) {
            more.push_back({at, std::min(at + kGroupRows, end[b]), static_cast<int64_t>(more.size())});
            extra_bin.push_back(b);
        }
    }
    std::vector<T> extra(more.size() * dim);
    auto sum = [&](const std::vector<RowGroup>& groups, T* out) {
        const int64_t count = static_cast<int64_t>(groups.size());
        if constexpr (sizeof(T) == 4) {
            METAREC_DISPATCH(sum_groups_f32)(x, weight, order.data(), groups.data(), count, dim, out);
        } else {
            METAREC_DISPATCH(sum_groups_f64)(x, weight, order.data(), groups.data(), count, dim, out);
        }
    };
    sum(first, sums);
    sum(more, extra.data());
    for (size_t g = 0; g < more.size(); ++g) {
        for (int64_t d = 0; d < dim; ++d) sums[extra_bin[g] * dim + d] += extra[g * dim + d];
    }
}

void check_codebook(int64_t codes, int64_t dim) {
    if (codes < 1 || dim < 1) {
        throw std::invalid_argument("codebook must hold at least one code of one element, got " +
                                    std::to_string(codes) + " of " + std::to_string(dim));
    }
}

}  // namespace

void bind_vq(py::module_& m) {
    // margin: None for none.
    m.def(
        "nearest_codeword",
        [](const Span& x, const Span& codebook, const Span& indices, const Span& margin, int64_t heads, int64_t rows,
           int64_t codes, int64_t dim, const std::string& metric) {
            check_codebook(codes, dim);
            const Metric by = metric_of(metric);
            const SearchOutput out = {indices.of<int64_t>("indices", {heads, rows}),
                                      margin.maybe<float>("margin", {heads, rows}),
                                      1,
                                      nullptr,
                                      nullptr,
                                      nullptr};
            if (x.is_wide<double, float>("x")) {
                const auto* of = x.of<const double>("x", {heads, rows, dim});
                const auto* among = codebook.of<const double>("codebook", {heads, codes, dim});
                const py::gil_scoped_release release;
                METAREC_DISPATCH(nearest_codeword_f64)(of, among, heads, rows, codes, dim, by, out.indices, out.margin);
            } else {
                const auto* of = x.of<const float>("x", {heads, rows, dim});
                const auto* among = codebook.of<const float>("codebook", {heads, codes, dim});
                const py::gil_scoped_release release;
                search(of, among, out, heads, rows, codes, dim, by);
            }
        },
        py::arg("x"), py::arg("codebook"), py::arg("indices"), py::arg("margin"), py::kw_only(), py::arg("heads"),
        py::arg("rows"), py::arg("codes"), py::arg("dim"), py::arg("metric"));
    m.def(
        "vq_commit",
        [](const Span& x, const Span& codebook, const Span& quantized, const Span& indices, const Span& row_error,
           const Span& margin, const Span& rechecked, int64_t margin_every, int64_t heads, int64_t rows, int64_t codes,
           int64_t dim, const std::string& metric) {
            check_codebook(codes, dim);
            const Metric by = metric_of(metric);
            check_at_least("margin_every", margin_every, 1);
            check_at_least("rows", rows, 0);
            const auto* of = x.of<const float>("x", {heads, rows, dim});
            const auto* among = codebook.of<const float>("codebook", {heads, codes, dim});
            const int64_t margins = rows == 0 ? 0 : (rows - 1) / margin_every + 1;
            const SearchOutput out = {indices.of<int64_t>("indices", {heads, rows}),
                                      margin.of<float>("margin", {heads, margins}),
                                      margin_every,
                                      quantized.of<float>("quantized", {heads, rows, dim}),
                                      row_error.of<float>("row_error", {heads, rows}),
                                      rechecked.of<int64_t>("rechecked", {})};
            const py::gil_scoped_release release;
            *out.rechecked = 0;
            search(of, among, out, heads, rows, codes, dim, by);
        },
        py::arg("x"), py::arg("codebook"), py::arg("quantized"), py::arg("indices"), py::arg("row_error"),
        py::arg("margin"), py::arg("rechecked"), py::kw_only(), py::arg("margin_every"), py::arg("heads"),
        py::arg("rows"), py::arg("codes"), py::arg("dim"), py::arg("metric"));
    // grad, grad_error: None for 0.
    m.def(
        "vq_backward",
        [](const Span& grad, const Span& grad_error, const Span& x, const Span& quantized, const Span& out,
           int64_t rows, int64_t dim, bool rotation) {
            const auto *of_code = grad.maybe<const float>("grad", {rows, dim}),
                       *of_error = grad_error.maybe<const float>("grad_error", {rows}),
                       *from = x.of<const float>("x", {rows, dim}),
                       *code = quantized.of<const float>("quantized", {rows, dim});
            auto* to = out.of<float>("out", {rows, dim});
            const py::gil_scoped_release release;
            METAREC_DISPATCH(vq_backward_f32)(of_code, of_error, from, code, rows, dim, rotation, to);
        },
        py::arg("grad"), py::arg("grad_error"), py::arg("x"), py::arg("quantized"), py::arg("out"), py::kw_only(),
        py::arg("rows"), py::arg("dim"), py::arg("rotation"));
    // weight: None for 1.
    m.def(
        "vq_statistics",
        [](const Span& x, const Span& indices, const Span& weight, const Span& counts, const Span& sums, int64_t heads,
           int64_t rows, int64_t codes, int64_t dim) {
            check_codebook(codes, dim);
            const auto run = [&](auto* to) {
                using T = std::remove_pointer_t<decltype(to)>;
                const auto* of = x.of<const T>("x", {heads, rows, dim});
                const auto* index = indices.of<const int64_t>("indices", {heads, rows});
                const auto* by = weight.maybe<const T>("row_weight", {heads, rows});
                auto* number = counts.of<T>("counts", {heads, codes});
                const py::gil_scoped_release release;
                statistics(of, index, by, number, to, heads, rows, codes, dim);
            };
            if (x.is_wide<double, float>("x")) {
                run(sums.of<double>("sums", {heads, codes, dim}));
            } else {
                run(sums.of<float>("sums", {heads, codes, dim}));
            }
        },
        py::arg("x"), py::arg("indices"), py::arg("weight"), py::arg("counts"), py::arg("sums"), py::kw_only(),
        py::arg("heads"), py::arg("rows"), py::arg("codes"), py::arg("dim"));
}

}  // namespace metarec
