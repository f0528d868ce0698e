#include "core/bindings.h"

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "vq/backward.h"
#include "vq/exact.h"
#include "vq/nearest_codeword.h"
#include "vq/prepared_codebook.h"
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

void search(const float* x, const float* codebook, const SearchOutput& out, int64_t heads, int64_t rows, int64_t codes,
            int64_t dim) {
    if (codes > std::numeric_limits<int32_t>::max()) {
        throw std::invalid_argument("codebook must hold fewer than 2^31 codes, got " + std::to_string(codes));
    }
    if (heads * rows == 0) return;
    const int threads = heads * rows * codes * dim < 1 << 15 ? 1 : max_threads();
    auto run = [&](int bits, const SearchRows& of, const Unsettled* unsettled) {
        const PreparedCodebook prepared(codebook, heads, codes, dim, bits);
        const AlignedMemory scratch = allocate_aligned(threads * METAREC_DISPATCH(search_scratch)(prepared.view()));
        METAREC_DISPATCH(nearest_codeword_f32)(prepared.view(), of, threads, scratch.get(), out, unsettled);
    };
    const int screen = METAREC_DISPATCH(screen_bits)(dim);
    if (screen == 32) {
        run(32, {x, rows, nullptr, nullptr}, nullptr);
        return;
    }
    const std::unique_ptr<int64_t[]> unsettled_rows(new int64_t[heads * rows]);
    std::vector<int64_t> unsettled_count(heads, 0);
    const Unsettled unsettled = {unsettled_rows.get(), unsettled_count.data()};
    run(screen, {x, rows, nullptr, nullptr}, &unsettled);
    if (std::any_of(unsettled_count.begin(), unsettled_count.end(), [](int64_t count) { return count > 0; })) {
        run(32, {x, rows, unsettled.rows, unsettled.count}, nullptr);
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

}  // namespace

void bind_vq(py::module_& m) {
    m.def(
        "nearest_codeword",
        [](uintptr_t x, uintptr_t codebook, uintptr_t indices, uintptr_t margin, int64_t heads, int64_t rows,
           int64_t codes, int64_t dim, bool is_double) {
            py::gil_scoped_release release;
            if (is_double) {
                METAREC_DISPATCH(nearest_codeword_f64)
                (pointer<const double>(x), pointer<const double>(codebook), heads, rows, codes, dim,
                 pointer<int64_t>(indices), pointer<float>(margin));
            } else {
                search(pointer<const float>(x), pointer<const float>(codebook),
                       {pointer<int64_t>(indices), pointer<float>(margin), 1, nullptr, nullptr, nullptr}, heads, rows,
                       codes, dim);
            }
        },
        py::arg("x"), py::arg("codebook"), py::arg("indices"), py::arg("margin"), py::kw_only(), py::arg("heads"),
        py::arg("rows"), py::arg("codes"), py::arg("dim"), py::arg("is_double"));
    m.def(
        "vq_commit",
        [](uintptr_t x, uintptr_t codebook, uintptr_t quantized, uintptr_t indices, uintptr_t row_error,
           uintptr_t margin, uintptr_t rechecked, int64_t margin_every, int64_t heads, int64_t rows, int64_t codes,
           int64_t dim) {
            py::gil_scoped_release release;
            *pointer<int64_t>(rechecked) = 0;
            search(pointer<const float>(x), pointer<const float>(codebook),
                   {pointer<int64_t>(indices), pointer<float>(margin), margin_every, pointer<float>(quantized),
                    pointer<float>(row_error), pointer<int64_t>(rechecked)},
                   heads, rows, codes, dim);
        },
        py::arg("x"), py::arg("codebook"), py::arg("quantized"), py::arg("indices"), py::arg("row_error"),
        py::arg("margin"), py::arg("rechecked"), py::kw_only(), py::arg("margin_every"), py::arg("heads"),
        py::arg("rows"), py::arg("codes"), py::arg("dim"));
    m.def(
        "vq_backward",
        [](uintptr_t grad, uintptr_t grad_error, uintptr_t x, uintptr_t quantized, uintptr_t out, int64_t rows,
           int64_t dim, bool rotation) {
            py::gil_scoped_release release;
            METAREC_DISPATCH(vq_backward_f32)
            (pointer<const float>(grad), pointer<const float>(grad_error), pointer<const float>(x),
             pointer<const float>(quantized), rows, dim, rotation, pointer<float>(out));
        },
        py::arg("grad"), py::arg("grad_error"), py::arg("x"), py::arg("quantized"), py::arg("out"), py::kw_only(),
        py::arg("rows"), py::arg("dim"), py::arg("rotation"));
    m.def(
        "vq_statistics",
        [](uintptr_t x, uintptr_t indices, uintptr_t weight, uintptr_t counts, uintptr_t sums, int64_t heads,
           int64_t rows, int64_t codes, int64_t dim, bool is_double) {
            py::gil_scoped_release release;
            if (is_double) {
                statistics(pointer<const double>(x), pointer<const int64_t>(indices), pointer<const double>(weight),
                           pointer<double>(counts), pointer<double>(sums), heads, rows, codes, dim);
            } else {
                statistics(pointer<const float>(x), pointer<const int64_t>(indices), pointer<const float>(weight),
                           pointer<float>(counts), pointer<float>(sums), heads, rows, codes, dim);
            }
        },
        py::arg("x"), py::arg("indices"), py::arg("weight"), py::arg("counts"), py::arg("sums"), py::kw_only(),
        py::arg("heads"), py::arg("rows"), py::arg("codes"), py::arg("dim"), py::arg("is_double"));
}

}  // namespace metarec
