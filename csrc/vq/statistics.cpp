#include "vq/statistics.h"

namespace metarec::METAREC_ISA {
namespace {

template <typename T>
inline void finite_rows(const T* x, int64_t rows, int64_t dim, uint8_t* kept) {
#pragma omp parallel for schedule(static) if (rows * dim > 1 << 15)
    for (int64_t row = 0; row < rows; ++row) {
        const T* value = x + row * dim;
        int bad = 0;
        for (int64_t d = 0; d < dim; ++d) bad |= value[d] - value[d] != 0;  // NaN for infinities and NaN
        kept[row] = bad == 0;
    }
}

template <typename T>
inline void sum_groups(const T* x, const T* weight, const int64_t* order, const RowGroup* groups, int64_t count,
                       int64_t dim, T* sums) {
#pragma omp parallel for schedule(dynamic, 16)
    for (int64_t g = 0; g < count; ++g) {
        T* __restrict sum = sums + groups[g].target * dim;
        for (int64_t d = 0; d < dim; ++d) sum[d] = 0;
        for (int64_t i = groups[g].begin; i < groups[g].end; ++i) {
            const T* __restrict row = x + order[i] * dim;
            if (weight == nullptr) {
                for (int64_t d = 0; d < dim; ++d) sum[d] += row[d];
            } else {
                const T scale = weight[order[i]];
                for (int64_t d = 0; d < dim; ++d) sum[d] += scale * row[d];
            }
        }
    }
}

}  // namespace

void finite_rows_f32(const float* x, int64_t rows, int64_t dim, uint8_t* kept) { finite_rows(x, rows, dim, kept); }

void finite_rows_f64(const double* x, int64_t rows, int64_t dim, uint8_t* kept) { finite_rows(x, rows, dim, kept); }

void sum_groups_f32(const float* x, const float* weight, const int64_t* order, const RowGroup* groups, int64_t count,
                    int64_t dim, float* sums) {
    sum_groups(x, weight, order, groups, count, dim, sums);
}

void sum_groups_f64(const double* x, const double* weight, const int64_t* order, const RowGroup* groups, int64_t count,
                    int64_t dim, double* sums) {
    sum_groups(x, weight, order, groups, count, dim, sums);
}

}  // namespace metarec::METAREC_ISA
