#include "sequence/linear_cross_entropy.h"

#include <cfloat>

#include "core/vec_math.h"

namespace metarec::METAREC_ISA {
namespace {

// A product keeps kRows x 2 vectors of sums in registers: 12 of 16, or 24 of the 32 that AVX-512 has.
#if defined(METAREC_ISA_avx512)
constexpr int kRows = 12;
#else
constexpr int kRows = 6;
#endif
constexpr int kCols = 2 * kFloats;
constexpr int kTile = 96;     // items of a tile: a multiple of kRows and kCols; 24 KB of table at D = 64, in L1
constexpr int kBlock = 48;    // rows whose probabilities exist at a time in the backward pass
constexpr int kGroups = 16;   // runs of tiles that threads take; fixed, so that sums do not depend on the threads
constexpr int kLine = 16;     // floats of a cache line

static_assert(kTile % kRows == 0 && kTile % kCols == 0 && kBlock % kRows == 0);

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t tile_count(int64_t V) { return (V + kTile - 1) / kTile; }
inline int64_t group_count(int64_t V) { return min(kGroups, tile_count(V)); }

// Hands out scratch memory, in whole cache lines.
struct Arena {
    float* next;
    float* take(int64_t floats) {
        float* taken = next;
        next += round_up(floats, kLine);
        return taken;
    }
};

// c[i, j] = start[i, j] + sum_k a[k, i] b[k, j] for kRows x kCols elements.
// a[k, i] lies at k * kStepA + i * kStrideA, b[k, j] at k * kCols + j.
template <int kStepA, int kStrideA>
inline void product(const float* __restrict a, const float* __restrict b, int64_t steps, const float* start,
                    int64_t start_stride, float* c, int64_t c_stride) {
    vfloat sum[kRows][2];
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
        sum[i][0] = load(start + i * start_stride);
        sum[i][1] = load(start + i * start_stride + kFloats);
    }
    for (int64_t k = 0; k < steps; ++k, a += kStepA, b += kCols) {
        const vfloat b0 = load(b), b1 = load(b + kFloats);
#pragma GCC unroll 12
        for (int i = 0; i < kRows; ++i) {
            const vfloat a_i = broadcast(a[i * kStrideA]);
            sum[i][0] += a_i * b0;
            sum[i][1] += a_i * b1;
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
        store(c + i * c_stride, sum[i][0]);
        store(c + i * c_stride + kFloats, sum[i][1]);
    }
}

// Rows as the left factor of the logits: [rows / kRows][D][kRows]. `rows` chooses and orders them; missing ones are 0.
inline void pack_left(const float* x, const int64_t* rows, int64_t n, int64_t D, float* __restrict packed) {
    const int64_t blocks = round_up(n, kRows) / kRows;
#pragma omp parallel for schedule(static) if (blocks > 64)
    for (int64_t block = 0; block < blocks; ++block) {
        float* __restrict out = packed + block * kRows * D;
        for (int64_t r = 0; r < kRows; ++r) {
            const int64_t i = block * kRows + r;
            const float* row = x + (i < n ? (rows == nullptr ? i : rows[i]) : 0) * D;
            for (int64_t d = 0; d < D; ++d) out[d * kRows + r] = i < n ? row[d] : 0.0f;
        }
    }
}

// A tile of items as the right factor of the logits: [kTile / kCols][D][kCols]. Missing items are 0.
inline void pack_items(const float* __restrict table, int64_t items, int64_t D, float* __restrict packed) {
    for (int64_t panel = 0; panel < kTile / kCols; ++panel) {
        const float* from = table + panel * kCols * D;
        float* __restrict out = packed + panel * kCols * D;
        const int64_t n = items - panel * kCols;
        if (n >= kCols) {
            for (int64_t d = 0; d < D; ++d) {
                for (int64_t v = 0; v < kCols; ++v) out[d * kCols + v] = from[v * D + d];
            }
        } else {
            for (int64_t d = 0; d < D; ++d) {
                for (int64_t v = 0; v < kCols; ++v) out[d * kCols + v] = v < n ? from[v * D + d] : 0.0f;
            }
        }
    }
}

// Rows as the right factor of a gradient: columns in panels, [width / kCols][padded][kCols]. Missing elements are 0.
inline void pack_right(const float* x, const int64_t* rows, int64_t n, int64_t padded, int64_t D, int64_t width,
                       float* __restrict packed) {
    for (int64_t i = 0; i < padded; ++i) {
        const float* row = x + (i < n ? (rows == nullptr ? i : rows[i]) : 0) * D;
        for (int64_t d0 = 0; d0 < width; d0 += kCols) {
            float* __restrict out = packed + d0 * padded + i * kCols;
            const int64_t filled = i < n ? min(kCols, D - d0) : 0;
            if (filled == kCols) {
                store(out, load(row + d0));
                store(out + kFloats, load(row + d0 + kFloats));
            } else {
                for (int64_t d = 0; d < kCols; ++d) out[d] = d < filled ? row[d0 + d] : 0.0f;
            }
        }
    }
}

// The bias of a tile; items that do not exist get the logit -inf, so their probability is 0.
inline void pack_bias(const float* bias, int64_t items, float* __restrict packed) {
    for (int64_t v = 0; v < kTile; ++v) packed[v] = v >= items ? -__builtin_inff() : bias == nullptr ? 0.0f : bias[v];
}

}  // namespace

int64_t linear_cross_entropy_scratch(int64_t T, int64_t V, int64_t D) {
    const int64_t rows = round_up(T, kRows), width = round_up(D, kCols), groups = group_count(V);
    const int64_t vectors = 16;  // slices taken below, each rounded up to a line
    const int64_t forward = rows * D + T + groups * (kTile * (D + 1 + kRows) + 2 * rows * kFloats);
    const int64_t backward = rows * (D + width + 2) + 4 * T +
                             groups * (kTile * (D + 2 * width + kBlock + 2) + rows * width);
    return (forward > backward ? forward : backward) + (groups + 1) * vectors * kLine;
}

void linear_cross_entropy_forward(const float* h, const float* table, const int64_t* targets, const float* bias,
                                  float* loss, float* lse, float* scratch, int64_t T, int64_t V, int64_t D) {
    const int64_t rows = round_up(T, kRows), tiles = tile_count(V), groups = group_count(V);
    Arena arena{scratch};
    float* left = arena.take(rows * D);
    float* target_logit = arena.take(T);
    // Every group keeps the maximum and the sum of exponentials lane by lane; they meet at the end.
    float* maxima = arena.take(groups * rows * kFloats);
    float* sums = arena.take(groups * rows * kFloats);
    const int64_t tile_floats = round_up(kTile * D, kLine) + kTile + kRows * kTile;
    float* tile_space = arena.take(groups * tile_floats);
    pack_left(h, nullptr, T, D, left);

#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t group = 0; group < groups; ++group) {
        Arena own{tile_space + group * tile_floats};
        float* items = own.take(kTile * D);
        float* start = own.take(kTile);
        float* logits = own.take(kRows * kTile);
        float* group_max = maxima + group * rows * kFloats;
        float* group_sum = sums + group * rows * kFloats;
        for (int64_t t = 0; t < rows; ++t) {
            store(group_max + t * kFloats, broadcast(-FLT_MAX));  // finite: logits of -inf then add exp(-inf) = 0
            store(group_sum + t * kFloats, vfloat{});
        }
        for (int64_t tile = tiles * group / groups; tile < tiles * (group + 1) / groups; ++tile) {
            const int64_t v0 = tile * kTile, n = min(kTile, V - v0);
            pack_items(table + v0 * D, n, D, items);
            pack_bias(bias == nullptr ? nullptr : bias + v0, n, start);
            for (int64_t t0 = 0; t0 < T; t0 += kRows) {
                for (int64_t v = 0; v < kTile; v += kCols) {
                    product<kRows, 1>(left + t0 * D, items + v * D, D, start + v, 0, logits + v, kTile);
                }
                for (int64_t t = t0; t < min(t0 + kRows, T); ++t) {
                    const float* row = logits + (t - t0) * kTile;
                    if (targets[t] >= v0 && targets[t] < v0 + n) target_logit[t] = row[targets[t] - v0];
                    const vfloat last = load(group_max + t * kFloats);
                    vfloat top = last, top2 = load(row);
#pragma GCC unroll 4
                    for (int v = 0; v < kTile; v += 2 * kFloats) {
                        top = max(load(row + v), top);
                        top2 = max(load(row + v + kFloats), top2);
                    }
                    top = max(top2, top);
                    vfloat sum = load(group_sum + t * kFloats) * exp(last - top), sum2{};
                    for (int v = 0; v < kTile; v += 2 * kFloats) {
                        sum += exp(load(row + v) - top);
                        sum2 += exp(load(row + v + kFloats) - top);
                    }
                    store(group_max + t * kFloats, top);
                    store(group_sum + t * kFloats, sum + sum2);
                }
            }
        }
    }

#pragma omp parallel for schedule(static) if (T > 64)
    for (int64_t t = 0; t < T; ++t) {
        vfloat top = broadcast(-FLT_MAX);
        for (int64_t group = 0; group < groups; ++group) top = max(load(maxima + (group * rows + t) * kFloats), top);
        float highest = top[0];
        for (int i = 1; i < kFloats; ++i) highest = top[i] > highest ? top[i] : highest;
        vfloat sum{};
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t at = (group * rows + t) * kFloats;
            sum += load(sums + at) * exp(load(maxima + at) - highest);
        }
        float total = 0.0f;
        for (int i = 0; i < kFloats; ++i) total += sum[i];
        const float log_total = __builtin_logf(total);
        lse[t] = highest + log_total;
        loss[t] = (highest - target_logit[t]) + log_total;  // this order keeps small losses exact
    }
}

void linear_cross_entropy_backward(const float* grad, const float* h, const float* table, const int64_t* targets,
                                   const float* bias, const float* lse, float* grad_h, float* grad_table,
                                   float* grad_bias, float* scratch, int64_t T, int64_t V, int64_t D) {
    const int64_t tiles = tile_count(V), groups = group_count(V), width = round_up(D, kCols);
    Arena arena{scratch};
    int64_t* active = reinterpret_cast<int64_t*>(arena.take(2 * T));
    int64_t* target = reinterpret_cast<int64_t*>(arena.take(2 * T));
    int64_t n_active = 0;
    for (int64_t t = 0; t < T; ++t) {
        if (grad[t] != 0.0f) {
            target[n_active] = targets[t];
            active[n_active++] = t;
        } else if (grad_h != nullptr) {
            for (int64_t d = 0; d < D; ++d) grad_h[t * D + d] = 0.0f;
        }
    }
    const int64_t rows = round_up(n_active, kRows);
    float* left = arena.take(rows * D);
    float* right = arena.take(rows * width);
    float* row_grad = arena.take(rows);
    float* row_lse = arena.take(rows);
    float* partial_h = arena.take(groups * rows * width);
    const int64_t tile_floats = round_up(kTile * D, kLine) + kTile * (2 * width + kBlock + 2);
    float* tile_space = arena.take(groups * tile_floats);
    pack_left(h, active, n_active, D, left);
    if (grad_table != nullptr) pack_right(h, active, n_active, rows, D, width, right);
    for (int64_t i = 0; i < rows; ++i) {
        row_grad[i] = i < n_active ? grad[active[i]] : 0.0f;
        row_lse[i] = i < n_active ? lse[active[i]] : FLT_MAX;  // probability 0 whatever the bias
    }

#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t group = 0; group < groups; ++group) {
        Arena own{tile_space + group * tile_floats};
        float* items = own.take(kTile * D);
        float* columns = own.take(kTile * width);
        float* tile_grad = own.take(kTile * width);
        float* p = own.take(kBlock * kTile);
        float* start = own.take(kTile);
        float* bias_sum = own.take(kTile);
        float* group_h = partial_h + group * rows * width;
        if (grad_h != nullptr) {
            for (int64_t i = 0; i < rows * width; ++i) group_h[i] = 0.0f;
        }
        for (int64_t tile = tiles * group / groups; tile < tiles * (group + 1) / groups; ++tile) {
            const int64_t v0 = tile * kTile, n = min(kTile, V - v0);
            pack_items(table + v0 * D, n, D, items);
            pack_bias(bias == nullptr ? nullptr : bias + v0, n, start);
            if (grad_h != nullptr) pack_right(table + v0 * D, nullptr, n, kTile, D, width, columns);
            for (int64_t i = 0; i < kTile * width; ++i) tile_grad[i] = 0.0f;
            for (int64_t v = 0; v < kTile; ++v) bias_sum[v] = 0.0f;
            for (int64_t t0 = 0; t0 < rows; t0 += kBlock) {
                const int64_t block = min(kBlock, rows - t0);
                for (int64_t i = 0; i < block; i += kRows) {
                    for (int64_t v = 0; v < kTile; v += kCols) {
                        product<kRows, 1>(left + (t0 + i) * D, items + v * D, D, start + v, 0, p + i * kTile + v, kTile);
                    }
                    for (int64_t r = i; r < i + kRows; ++r) {
                        float* row = p + r * kTile;
                        const float shift = row_lse[t0 + r], scale = row_grad[t0 + r];
#pragma GCC unroll 2
                        for (int v = 0; v < kTile; v += kFloats) store(row + v, exp(load(row + v) - shift) * scale);
                        if (t0 + r < n_active && target[t0 + r] >= v0 && target[t0 + r] < v0 + n) {
                            row[target[t0 + r] - v0] -= scale;
                        }
                    }
                }
                if (grad_h != nullptr) {
                    for (int64_t d = 0; d < width; d += kCols) {
                        for (int64_t i = 0; i < block; i += kRows) {
                            float* c = group_h + (t0 + i) * width + d;
                            product<1, kTile>(p + i * kTile, columns + d * kTile, kTile, c, width, c, width);
                        }
                    }
                }
                if (grad_table != nullptr) {
                    for (int64_t d = 0; d < width; d += kCols) {
                        const float* b = right + d * rows + t0 * kCols;
                        for (int64_t v = 0; v < kTile; v += kRows) {
                            float* c = tile_grad + v * width + d;
                            product<kTile, 1>(p + v, b, block, c, width, c, width);
                        }
                    }
                }
                if (grad_bias != nullptr) {
                    for (int64_t r = 0; r < block; ++r) {
                        for (int v = 0; v < kTile; v += kFloats) {
                            store(bias_sum + v, load(bias_sum + v) + load(p + r * kTile + v));
                        }
                    }
                }
            }
            for (int64_t v = 0; v < n; ++v) {
                if (grad_table != nullptr) {
                    for (int64_t d = 0; d < D; ++d) grad_table[(v0 + v) * D + d] = tile_grad[v * width + d];
                }
                if (grad_bias != nullptr) grad_bias[v0 + v] = bias_sum[v];
            }
        }
    }

    if (grad_h == nullptr) return;
#pragma omp parallel for schedule(static) if (n_active > 64)
    for (int64_t i = 0; i < n_active; ++i) {
        float* __restrict out = grad_h + active[i] * D;
        for (int64_t d = 0; d < D; ++d) out[d] = partial_h[i * width + d];
        for (int64_t group = 1; group < groups; ++group) {
            const float* __restrict part = partial_h + (group * rows + i) * width;
            for (int64_t d = 0; d < D; ++d) out[d] += part[d];
        }
    }
}

}  // namespace metarec::METAREC_ISA
