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
constexpr int kTile = 96;    // items of a tile: a multiple of kRows and kCols; 24 KB of table at D = 64, in L1
constexpr int kBlock = 48;   // rows whose probabilities exist at a time in the backward pass
constexpr int kGroups = 16;  // runs of tiles that threads take; fixed, so that sums do not depend on the threads
constexpr int kLine = 16;    // floats of a cache line

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

// out[i, v] = start[v] + <left[i], items[v]> for `rows` rows and a tile of items. start_stride kTile: one start a row.
inline void multiply_tile(const float* left, const float* items, int64_t rows, int64_t D, const float* start,
                          int64_t start_stride, float* out) {
    for (int64_t i = 0; i < rows; i += kRows) {
        for (int64_t v = 0; v < kTile; v += kCols) {
            product<kRows, 1>(left + i * D, items + v * D, D, start + i * start_stride + v, start_stride,
                              out + i * kTile + v, kTile);
        }
    }
}

// sum[i] += sum_v p[i, v] columns[v] for `rows` rows.
inline void add_to_rows(const float* p, const float* columns, int64_t rows, int64_t width, float* sum) {
    for (int64_t d = 0; d < width; d += kCols) {
        for (int64_t i = 0; i < rows; i += kRows) {
            float* c = sum + i * width + d;
            product<1, kTile>(p + i * kTile, columns + d * kTile, kTile, c, width, c, width);
        }
    }
}

// sum[v] += sum_i p[i, v] right[i] for a tile of items; right starts at the first row, its panels are `stride` rows
// long.
inline void add_to_items(const float* p, const float* right, int64_t rows, int64_t stride, int64_t width, float* sum) {
    for (int64_t d = 0; d < width; d += kCols) {
        for (int64_t v = 0; v < kTile; v += kRows) {
            float* c = sum + v * width + d;
            product<kTile, 1>(p + v, right + d * stride, rows, c, width, c, width);
        }
    }
}

inline void add_columns(const float* p, int64_t rows, float* sum) {
    for (int64_t i = 0; i < rows; ++i) {
        for (int v = 0; v < kTile; v += kFloats) store(sum + v, load(sum + v) + load(p + i * kTile + v));
    }
}

inline void clear(float* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] = 0.0f;
}

// Writes what a tile has gathered for its n items, the first of them v0.
inline void write_items(const float* tile_grad, const float* tile_bias, int64_t v0, int64_t n, int64_t D, int64_t width,
                        float* grad_table, float* grad_bias) {
    for (int64_t v = 0; v < n; ++v) {
        if (grad_table != nullptr) {
            for (int64_t d = 0; d < D; ++d) grad_table[(v0 + v) * D + d] = tile_grad[v * width + d];
        }
        if (grad_bias != nullptr) grad_bias[v0 + v] = tile_bias[v];
    }
}

// out[rows[i]] = the sum over groups of partial[group][i], in their order.
inline void reduce_groups(const float* partial, int64_t groups, int64_t padded, int64_t width, const int64_t* rows,
                          int64_t n, int64_t D, float* out) {
#pragma omp parallel for schedule(static) if (n > 64)
    for (int64_t i = 0; i < n; ++i) {
        float* __restrict sum = out + (rows == nullptr ? i : rows[i]) * D;
        for (int64_t d = 0; d < D; ++d) sum[d] = partial[i * width + d];
        for (int64_t group = 1; group < groups; ++group) {
            const float* __restrict part = partial + (group * padded + i) * width;
            for (int64_t d = 0; d < D; ++d) sum[d] += part[d];
        }
    }
}

// What the logits of a tile start from: the bias, and `missing` for items that do not exist.
inline void pack_start(const float* bias, int64_t items, float missing, float* __restrict packed) {
    for (int64_t v = 0; v < kTile; ++v) packed[v] = v >= items ? missing : bias == nullptr ? 0.0f : bias[v];
}

}  // namespace

int64_t linear_cross_entropy_scratch(int64_t T, int64_t V, int64_t D) {
    // What the double backward pass takes; the other two take less of everything.
    const int64_t rows = round_up(T, kRows), width = round_up(D, kCols), groups = group_count(V);
    const int64_t slices = 16;  // at most so many are taken at each level, rounded up to a line
    return 2 * rows * (D + width) + 4 * (rows + T) + groups * rows * (width + 2 * kFloats) +
           groups * kTile * (2 * D + 3 * width + 2 * kBlock + 3) + (groups + 1) * slices * kLine;
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
            pack_start(bias == nullptr ? nullptr : bias + v0, n, -__builtin_inff(), start);
            for (int64_t t0 = 0; t0 < T; t0 += kRows) {
                multiply_tile(left + t0 * D, items, kRows, D, start, 0, logits);
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
            clear(grad_h + t * D, D);
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
        float* tile_bias = own.take(kTile);
        float* group_h = partial_h + group * rows * width;
        if (grad_h != nullptr) clear(group_h, rows * width);
        for (int64_t tile = tiles * group / groups; tile < tiles * (group + 1) / groups; ++tile) {
            const int64_t v0 = tile * kTile, n = min(kTile, V - v0);
            pack_items(table + v0 * D, n, D, items);
            pack_start(bias == nullptr ? nullptr : bias + v0, n, -__builtin_inff(), start);
            if (grad_h != nullptr) pack_right(table + v0 * D, nullptr, n, kTile, D, width, columns);
            clear(tile_grad, kTile * width);
            clear(tile_bias, kTile);
            for (int64_t t0 = 0; t0 < rows; t0 += kBlock) {
                const int64_t block = min(kBlock, rows - t0);
                multiply_tile(left + t0 * D, items, block, D, start, 0, p);
                for (int64_t r = 0; r < block; ++r) {
                    float* row = p + r * kTile;
                    const float shift = row_lse[t0 + r], scale = row_grad[t0 + r];
#pragma GCC unroll 2
                    for (int v = 0; v < kTile; v += kFloats) store(row + v, exp(load(row + v) - shift) * scale);
                    if (t0 + r < n_active && target[t0 + r] >= v0 && target[t0 + r] < v0 + n) {
                        row[target[t0 + r] - v0] -= scale;
                    }
                }
                if (grad_h != nullptr) add_to_rows(p, columns, block, width, group_h + t0 * width);
                if (grad_table != nullptr) add_to_items(p, right + t0 * kCols, block, rows, width, tile_grad);
                if (grad_bias != nullptr) add_columns(p, block, tile_bias);
            }
            write_items(tile_grad, tile_bias, v0, n, D, width, grad_table, grad_bias);
        }
    }
    if (grad_h != nullptr) reduce_groups(partial_h, groups, rows, width, active, n_active, D, grad_h);
}

void linear_cross_entropy_double_backward(const float* grad, const float* h, const float* table, const int64_t* targets,
                                          const float* bias, const float* lse, const float* u, const float* w,
                                          const float* c, float* grad_grad, float* grad_h, float* grad_table,
                                          float* grad_bias, float* scratch, int64_t T, int64_t V, int64_t D) {
    // With P the probabilities, Y the one-hot targets and Q = u table' + h w' + c' the change of the logits:
    //   A = grad (P - Y),  B = grad P (Q - q),  q[t] = sum_v P[t, v] Q[t, v]
    //   grad_grad = q - Q[., target],  grad_h = B table + A w,  grad_table = B' h + A' u,  grad_bias = B' 1
    const int64_t rows = round_up(T, kRows), tiles = tile_count(V), groups = group_count(V), width = round_up(D, kCols);
    Arena arena{scratch};
    float* left_h = arena.take(rows * D);
    float* left_u = arena.take(rows * D);
    float* right_h = arena.take(rows * width);
    float* right_u = arena.take(rows * width);
    float* mean = arena.take(rows);
    float* target_change = arena.take(rows);
    float* partial_mean = arena.take(groups * rows);
    float* partial_h = arena.take(groups * rows * width);
    const int64_t tile_floats = 2 * round_up(kTile * D, kLine) + kTile * (3 * width + 2 * kBlock + 3);
    float* tile_space = arena.take(groups * tile_floats);
    pack_left(h, nullptr, T, D, left_h);
    if (u != nullptr) pack_left(u, nullptr, T, D, left_u);
    if (grad_table != nullptr) pack_right(h, nullptr, T, rows, D, width, right_h);
    if (grad_table != nullptr && u != nullptr) pack_right(u, nullptr, T, rows, D, width, right_u);
    clear(partial_mean, groups * rows);

    for (int pass = 0; pass < 2; ++pass) {
        const bool gather_mean = pass == 0;
#pragma omp parallel for schedule(dynamic, 1)
        for (int64_t group = 0; group < groups; ++group) {
            Arena own{tile_space + group * tile_floats};
            float* items = own.take(kTile * D);
            float* items_w = own.take(kTile * D);
            float* columns = own.take(kTile * width);
            float* columns_w = own.take(kTile * width);
            float* tile_grad = own.take(kTile * width);
            float* p = own.take(kBlock * kTile);
            float* q = own.take(kBlock * kTile);
            float* start = own.take(kTile);
            float* start_q = own.take(kTile);
            float* tile_bias = own.take(kTile);
            float* group_mean = partial_mean + group * rows;
            float* group_h = partial_h + group * rows * width;
            if (!gather_mean && grad_h != nullptr) clear(group_h, rows * width);
            for (int64_t tile = tiles * group / groups; tile < tiles * (group + 1) / groups; ++tile) {
                const int64_t v0 = tile * kTile, n = min(kTile, V - v0);
                pack_items(table + v0 * D, n, D, items);
                if (w != nullptr) pack_items(w + v0 * D, n, D, items_w);
                pack_start(bias == nullptr ? nullptr : bias + v0, n, -__builtin_inff(), start);
                pack_start(c == nullptr ? nullptr : c + v0, n, 0.0f, start_q);
                if (!gather_mean) {
                    if (grad_h != nullptr) pack_right(table + v0 * D, nullptr, n, kTile, D, width, columns);
                    if (grad_h != nullptr && w != nullptr) {
                        pack_right(w + v0 * D, nullptr, n, kTile, D, width, columns_w);
                    }
                    clear(tile_grad, kTile * width);
                    clear(tile_bias, kTile);
                }
                for (int64_t t0 = 0; t0 < rows; t0 += kBlock) {
                    const int64_t block = min(kBlock, rows - t0);
                    multiply_tile(left_h + t0 * D, items, block, D, start, 0, p);
                    for (int64_t i = 0; i < block * kTile; i += kFloats) store(q + i, load(start_q + i % kTile));
                    if (u != nullptr) multiply_tile(left_u + t0 * D, items, block, D, q, kTile, q);
                    if (w != nullptr) multiply_tile(left_h + t0 * D, items_w, block, D, q, kTile, q);
                    for (int64_t r = 0; r < block; ++r) {
                        const int64_t t = t0 + r;
                        float* p_row = p + r * kTile;
                        float* q_row = q + r * kTile;
                        const float shift = t < T ? lse[t] : FLT_MAX;  // a row of padding has probability 0
                        const bool here = t < T && targets[t] >= v0 && targets[t] < v0 + n;
                        if (gather_mean) {
                            vfloat sum{};
                            for (int v = 0; v < kTile; v += kFloats) {
                                sum += exp(load(p_row + v) - shift) * load(q_row + v);
                            }
                            for (int i = 0; i < kFloats; ++i) group_mean[t] += sum[i];
                            if (here) target_change[t] = q_row[targets[t] - v0];
                        } else {
                            const float scale = t < T ? grad[t] : 0.0f, q_mean = mean[t];
                            for (int v = 0; v < kTile; v += kFloats) {
                                const vfloat a = exp(load(p_row + v) - shift) * scale;
                                store(p_row + v, a);
                                store(q_row + v, a * (load(q_row + v) - q_mean));
                            }
                            if (here) p_row[targets[t] - v0] -= scale;
                        }
                    }
                    if (gather_mean) continue;
                    if (grad_h != nullptr) {
                        add_to_rows(q, columns, block, width, group_h + t0 * width);
                        if (w != nullptr) add_to_rows(p, columns_w, block, width, group_h + t0 * width);
                    }
                    if (grad_table != nullptr) {
                        add_to_items(q, right_h + t0 * kCols, block, rows, width, tile_grad);
                        if (u != nullptr) add_to_items(p, right_u + t0 * kCols, block, rows, width, tile_grad);
                    }
                    if (grad_bias != nullptr) add_columns(q, block, tile_bias);
                }
                if (!gather_mean) write_items(tile_grad, tile_bias, v0, n, D, width, grad_table, grad_bias);
            }
        }
        if (!gather_mean) continue;
        for (int64_t t = 0; t < rows; ++t) {
            mean[t] = 0.0f;
            for (int64_t group = 0; group < groups; ++group) mean[t] += partial_mean[group * rows + t];
            if (grad_grad != nullptr && t < T) grad_grad[t] = mean[t] - target_change[t];
        }
        if (grad_h == nullptr && grad_table == nullptr && grad_bias == nullptr) return;
    }
    if (grad_h != nullptr) reduce_groups(partial_h, groups, rows, width, nullptr, T, D, grad_h);
}

}  // namespace metarec::METAREC_ISA
