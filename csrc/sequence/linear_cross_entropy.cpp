#include "sequence/linear_cross_entropy.h"

#include <cfloat>

#include "core/vec_math.h"

// Items come in tiles and rows in blocks. What a tile and a block have in common (logits, probabilities) lies as
// [item][row], so that a vector holds one item for several rows: the table is then read as it lies in memory, and
// maxima and sums over items need no work across lanes. Groups of tiles are what threads take.

namespace metarec::METAREC_ISA {
namespace {

// A product keeps kRows x 2 vectors of sums in registers, which suffices to hide the latency of its additions.
constexpr int kRows = 6;
constexpr int kCols = 2 * kFloats;
constexpr int kTile = 96;       // items of a tile: 24 KB of table at D = 64, in L1
constexpr int kBlock = 96;      // rows of a tile that are worked on together
constexpr int kMostRows = 768;  // rows that are taken through the table together
constexpr int kGroups = 16;     // fixed, so that sums do not depend on the threads
constexpr int kLine = 16;       // floats of a cache line

// Exponentials of a block's rows that are kept from the first pass over the table to the second: floats at most, what
// a last level cache has room for. Beyond, computing them again is as fast.
constexpr int64_t kKept = int64_t{4} << 20;
// Below so many multiply-adds, a second thread starts later than one thread ends.
constexpr int64_t kWorthThreads = int64_t{1} << 19;

static_assert(kTile % kRows == 0 && kBlock % kRows == 0 && kBlock % kCols == 0);

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t tile_count(int64_t V) { return (V + kTile - 1) / kTile; }
inline int64_t group_count(int64_t V) { return min(kGroups, tile_count(V)); }

inline void clear(float* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] = 0.0f;
}

// ---------------------------------------------------------------------------------------------------------- products

// c[i, j] = start[i] + sum_k a(k, i) b[k, j] for kRows x kCols elements; without a start they add to c.
// a(k, i) is a[k * a_stride + i] if kAcross, else a[i * a_stride + k].
template <bool kAcross>
inline void product(const float* __restrict a, int64_t a_stride, const float* __restrict b, int64_t b_stride,
                    int64_t steps, const float* start, float* __restrict c, int64_t c_stride) {
    vfloat sum[kRows][2];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
        sum[i][0] = start == nullptr ? load(c + i * c_stride) : broadcast(start[i]);
        sum[i][1] = start == nullptr ? load(c + i * c_stride + kFloats) : sum[i][0];
    }
    for (int64_t k = 0; k < steps; ++k, b += b_stride) {
        const vfloat b0 = load(b), b1 = load(b + kFloats);
#pragma GCC unroll 6
        for (int i = 0; i < kRows; ++i) {
            const vfloat a_i = broadcast(kAcross ? a[k * a_stride + i] : a[i * a_stride + k]);
            sum[i][0] += a_i * b0;
            sum[i][1] += a_i * b1;
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
        store(c + i * c_stride, sum[i][0]);
        store(c + i * c_stride + kFloats, sum[i][1]);
    }
}

// out[v][j] = start[v] + <items[v], rows[j]> for kCols rows; without a start, out[v][j] += <items[v], rows[j]>.
// Items come in rows of `width` floats, kCols rows in the form of pack_across.
inline void multiply(const float* items, int64_t width, int64_t n, const float* rows, int64_t D, const float* start,
                     float* out, int64_t stride) {
    for (int64_t v = 0; v < n; v += kRows) {
        product<false>(items + v * width, width, rows, kCols, D, start == nullptr ? nullptr : start + v,
                       out + v * stride, stride);
    }
}

// sum[t] += sum_v p[v][t] items[v]
inline void add_to_rows(const float* p, const float* items, int64_t n, int64_t rows, int64_t width, float* sum) {
    for (int64_t t = 0; t < rows; t += kRows) {
        for (int64_t d = 0; d < width; d += kCols) {
            product<true>(p + t, kBlock, items + d, width, n, nullptr, sum + t * width + d, width);
        }
    }
}

// sum[v] += sum_t p[v][t] rows[t]
inline void add_to_items(const float* p, const float* rows, int64_t n, int64_t count, int64_t width, float* sum) {
    for (int64_t d = 0; d < width; d += kCols) {
        for (int64_t v = 0; v < n; v += kRows) {
            product<false>(p + v * kBlock, kBlock, rows + d, width, count, nullptr, sum + v * width + d, width);
        }
    }
}

// sum[v] += sum_t p[v][t]; elements of rows of padding must be 0.
inline void add_to_bias(const float* p, int64_t n, int64_t count, float* sum) {
    for (int64_t v = 0; v < n; ++v) {
        vfloat row{};
        for (int64_t t = 0; t < count; t += kFloats) row += load(p + v * kBlock + t);
        sum[v] += sum_lanes(row);
    }
}

// -------------------------------------------------------------------------------------------------- memory of a call

// Hands out scratch memory in whole cache lines; without memory it only counts.
struct Arena {
    float* memory;
    int64_t used = 0;
    float* take(int64_t floats) {
        float* taken = memory == nullptr ? nullptr : memory + used;
        used += round_up(floats, kLine);
        return taken;
    }
    int64_t* take_integers(int64_t n) { return reinterpret_cast<int64_t*>(take(2 * n)); }
};

inline bool keeps_exponentials(const LinearLogits& x) { return tile_count(x.V) * kTile * kBlock <= kKept; }

struct Workspace {
    int64_t rows;           // room for the rows of a block, and the stride between what the block has of each item
    int64_t width;          // D in whole vectors
    int64_t *row, *target;  // [T] rows that are not left out, and their targets
    float *across_h, *across_u, *along_h, *along_u;  // rows of a block, see pack_across and pack_along
    float *lse, *weight, *target_logit, *mean;       // [rows] of a block
    float *group_top, *group_sum, *group_h;          // [groups][rows], the last one [groups][rows][width]
    float *tops, *kept;                              // [tiles][kBlock], [tiles][kTile][kBlock]
    float *items, *items_w, *tile_grad;              // [groups][kTile][width]
    int64_t floats;

    Workspace(const LinearLogits& x, LinearPass pass, float* memory) {
        const bool twice = pass == LinearPass::double_backward,
                   keeps = pass == LinearPass::sum && keeps_exponentials(x);
        const int64_t tiles = tile_count(x.V), groups = group_count(x.V);
        rows = keeps ? kBlock : min(round_up(x.T, kBlock), kMostRows);
        width = round_up(x.D, kCols);
        Arena arena{memory};
        row = arena.take_integers(x.T);
        target = arena.take_integers(x.T);
        across_h = arena.take(rows * x.D);
        across_u = arena.take(twice ? rows * x.D : 0);
        along_h = arena.take(rows * width);
        along_u = arena.take(twice ? rows * width : 0);
        lse = arena.take(rows);
        weight = arena.take(rows);
        target_logit = arena.take(rows);
        mean = arena.take(rows);
        group_top = arena.take(groups * rows);
        group_sum = arena.take(groups * rows);
        group_h = arena.take(groups * rows * width);
        tops = arena.take(keeps ? tiles * rows : 0);
        kept = arena.take(keeps ? tiles * kTile * rows : 0);
        items = arena.take(groups * kTile * width);
        items_w = arena.take(twice ? groups * kTile * width : 0);
        tile_grad = arena.take(groups * kTile * width);
        floats = arena.used;
    }
};

// --------------------------------------------------------------------------------------------------- tiles and blocks

struct Tile {
    int64_t group, index, first, n;
    int64_t padded;  // n in whole kRows
    bool opens;      // the first one of its group
};

// Threads share the groups, and each group's tiles come in order.
template <typename Work>
inline void for_each_tile(const LinearLogits& x, int64_t rows, Work work) {
    const int64_t tiles = tile_count(x.V), groups = group_count(x.V);
#pragma omp parallel for schedule(static) if (rows * x.V * x.D > kWorthThreads)
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t begin = tiles * group / groups, end = tiles * (group + 1) / groups;
        for (int64_t tile = begin; tile < end; ++tile) {
            const int64_t first = tile * kTile, n = min(kTile, x.V - first);
            work(Tile{group, tile, first, n, round_up(n, kRows), tile == begin});
        }
    }
}

// The rows of a tile, `width` floats each: where they lie, or a copy padded with zeros.
inline const float* tile_rows(const float* table, const Tile& tile, int64_t D, int64_t width, float* copy) {
    if (D == width && tile.n == tile.padded) return table + tile.first * D;
    for (int64_t v = 0; v < tile.padded; ++v) {
        const float* row = table + (tile.first + v) * D;
        for (int64_t d = 0; d < width; ++d) copy[v * width + d] = v < tile.n && d < D ? row[d] : 0.0f;
    }
    return copy;
}

// What the logits of a tile start from: the bias, and `missing` for items that do not exist.
inline void tile_start(const float* bias, const Tile& tile, float missing, float* start) {
    for (int64_t v = 0; v < tile.padded; ++v) {
        start[v] = v >= tile.n ? missing : bias == nullptr ? 0.0f : bias[tile.first + v];
    }
}

// Where a tile's part of grad_table gathers, in rows of `width` floats; close_gradient puts a copy back.
inline float* open_gradient(float* grad_table, const Tile& tile, int64_t D, int64_t width, bool from_zero,
                            float* copy) {
    if (grad_table == nullptr) return nullptr;
    float* own = grad_table + tile.first * D;
    if (from_zero) clear(own, tile.n * D);
    return const_cast<float*>(tile_rows(grad_table, tile, D, width, copy));
}

inline void close_gradient(const float* gathered, float* grad_table, const Tile& tile, int64_t D, int64_t width) {
    float* own = grad_table == nullptr ? nullptr : grad_table + tile.first * D;
    if (gathered == own) return;
    for (int64_t v = 0; v < tile.n; ++v) {
        for (int64_t d = 0; d < D; ++d) own[v * D + d] = gathered[v * width + d];
    }
}

// Rows as the right factor of the logits: [rows / kCols][D][kCols]. Missing ones are 0.
inline void pack_across(const float* x, const int64_t* row, int64_t n, int64_t D, float* __restrict packed) {
    for (int64_t t = 0; t < round_up(n, kCols); ++t) {
        const float* __restrict from = x + (t < n ? row[t] : 0) * D;
        float* __restrict out = packed + t / kCols * kCols * D + t % kCols;
        for (int64_t d = 0; d < D; ++d) out[d * kCols] = t < n ? from[d] : 0.0f;
    }
}

// Rows as the right factor of a gradient: [rows][width].
inline void pack_along(const float* x, const int64_t* row, int64_t n, int64_t D, int64_t width,
                       float* __restrict packed) {
    for (int64_t t = 0; t < n; ++t) {
        const float* __restrict from = x + row[t] * D;
        for (int64_t d = 0; d < width; ++d) packed[t * width + d] = d < D ? from[d] : 0.0f;
    }
}

// Lists the rows that count, and returns how many they are.
inline int64_t choose_rows(const LinearLogits& x, const float* grad, const Workspace& w) {
    int64_t n = 0;
    for (int64_t t = 0; t < x.T; ++t) {
        if (x.targets[t] == x.ignored || (grad != nullptr && grad[t] == 0.0f)) continue;
        w.target[n] = x.targets[t];
        w.row[n++] = t;
    }
    return n;
}

// Of the other rows, the `size` floats of a result are 0.
inline void clear_other_rows(const Workspace& w, int64_t chosen, int64_t T, int64_t size, float* out) {
    if (out == nullptr || chosen == T) return;
    for (int64_t t = 0, i = 0; t < T; ++t) {
        if (i < chosen && w.row[i] == t) {
            ++i;
        } else {
            clear(out + t * size, size);
        }
    }
}

// out[t] = values[row[t]], and `missing` up to the end of the block.
inline void gather(const float* values, const int64_t* row, int64_t n, int64_t rows, float missing, float* out) {
    for (int64_t t = 0; t < rows; ++t) out[t] = t < n ? values[row[t]] : missing;
}

// Calls work(v, t) for each row t of the block whose target is item v of the tile.
template <typename Work>
inline void for_each_target(const int64_t* target, int64_t begin, int64_t end, const Tile& tile, Work work) {
    for (int64_t t = begin; t < end; ++t) {
        const uint64_t v = static_cast<uint64_t>(target[t] - tile.first);
        if (v < static_cast<uint64_t>(tile.n)) work(static_cast<int64_t>(v), t);
    }
}

// grad_h[row[t]] = the sum over groups of group_h[group][t], in their order.
inline void write_rows(const LinearLogits& x, const Workspace& w, const int64_t* row, int64_t n, float* grad_h) {
    const int64_t groups = group_count(x.V);
#pragma omp parallel for schedule(static) if (groups * n * x.D > kWorthThreads / 8)
    for (int64_t t = 0; t < n; ++t) {
        float* __restrict sum = grad_h + row[t] * x.D;
        for (int64_t d = 0; d < x.D; ++d) sum[d] = w.group_h[t * w.width + d];
        for (int64_t group = 1; group < groups; ++group) {
            const float* __restrict part = w.group_h + (group * w.rows + t) * w.width;
            for (int64_t d = 0; d < x.D; ++d) sum[d] += part[d];
        }
    }
}

// ------------------------------------------------------------------------------------------------------------ softmax

// Takes n items' logits of kCols rows into the rows' maximum and sum of exponentials. kKeep: exp(x - top) replaces x.
template <bool kKeep>
inline void add_exponentials(float* x, int64_t stride, int64_t n, float* top, float* sum) {
    for (int64_t j = 0; j < kCols; j += kFloats) {
        const vfloat last = load(top + j);
        vfloat high = last, high2 = last;
        for (int64_t v = 0; v < n; v += 2) {  // a NaN stays out of the maximum, for exp() to hand it on
            high = max(load(x + v * stride + j), high);
            high2 = max(load(x + (v + 1) * stride + j), high2);
        }
        high = max(high, high2);
        vfloat total = load(sum + j) * exp(last - high), total2{};
        for (int64_t v = 0; v < n; v += 2) {
            const vfloat e = exp(load(x + v * stride + j) - high), e2 = exp(load(x + (v + 1) * stride + j) - high);
            if (kKeep) {
                store(x + v * stride + j, e);
                store(x + (v + 1) * stride + j, e2);
            }
            total += e;
            total2 += e2;
        }
        store(top + j, high);
        store(sum + j, total + total2);
    }
}

// The first pass over the table: maxima and sums of exponentials of a block of n rows, by groups.
template <bool kKeep>
inline void gather_softmax(const LinearLogits& x, const Workspace& w, const int64_t* target, int64_t n) {
    for_each_tile(x, n, [&](const Tile& tile) {
        alignas(64) float space[kTile * kCols], start[kTile];
        const float* items = tile_rows(x.table, tile, x.D, w.width, w.items + tile.group * kTile * w.width);
        tile_start(x.bias, tile, -__builtin_inff(), start);
        float* top = w.group_top + tile.group * w.rows;
        float* sum = w.group_sum + tile.group * w.rows;
        for (int64_t t = 0; t < n; t += kCols) {
            const int64_t stride = kKeep ? kBlock : kCols;
            float* logits = kKeep ? w.kept + tile.index * kTile * kBlock + t : space;
            multiply(items, w.width, tile.padded, w.across_h + t * x.D, x.D, start, logits, stride);
            for_each_target(target, t, min(t + kCols, n), tile,
                            [&](int64_t v, int64_t t1) { w.target_logit[t1] = logits[v * stride + t1 - t]; });
            if (tile.opens) {
                for (int64_t j = 0; j < kCols; j += kFloats) {
                    store(top + t + j, broadcast(-FLT_MAX));  // finite: logits of -inf then add exp(-inf) = 0
                    store(sum + t + j, vfloat{});
                }
            }
            add_exponentials<kKeep>(logits, stride, tile.padded, top + t, sum + t);
            if (kKeep) {
                for (int64_t j = 0; j < kCols; j += kFloats) {
                    store(w.tops + tile.index * kBlock + t + j, load(top + t + j));
                }
            }
        }
    });
}

// Joins the groups: lse of the block's rows, and the results of the rows they stand for.
inline void finish_softmax(const LinearLogits& x, const Workspace& w, const int64_t* row, int64_t n, float* loss,
                           float* lse) {
    const int64_t groups = group_count(x.V);
    for (int64_t t0 = 0; t0 < n; t0 += kFloats) {
        vfloat highest = broadcast(-FLT_MAX), total{};
        for (int64_t group = 0; group < groups; ++group) {
            highest = max(load(w.group_top + group * w.rows + t0), highest);
        }
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t at = group * w.rows + t0;
            total += load(w.group_sum + at) * exp(load(w.group_top + at) - highest);
        }
        for (int64_t t = t0; t < min(t0 + kFloats, n); ++t) {
            const float log_total = __builtin_logf(total[t - t0]);
            w.lse[t] = lse[row[t]] = highest[t - t0] + log_total;
            loss[row[t]] = (highest[t - t0] - w.target_logit[t]) + log_total;  // this order keeps small losses exact
        }
    }
    for (int64_t t = n; t < w.rows; ++t) w.lse[t] = FLT_MAX;  // probability 0 whatever the bias
}

// The second pass over the table: gradients of a block of n rows of weight w.weight. kKept: from the exponentials that
// gather_softmax has kept, else from the logits, computed again.
template <bool kKept>
inline void gather_gradients(const LinearLogits& x, const Workspace& w, const int64_t* target, int64_t n, bool opens,
                             const LinearGradients& out) {
    for_each_tile(x, n, [&](const Tile& tile) {
        alignas(64) float space[kTile * kBlock], start[kTile], scale[kBlock];
        const float* items = tile_rows(x.table, tile, x.D, w.width, w.items + tile.group * kTile * w.width);
        float* grad_items =
            open_gradient(out.table, tile, x.D, w.width, opens, w.tile_grad + tile.group * kTile * w.width);
        float* group_h = w.group_h + tile.group * w.rows * w.width;
        if (!kKept) tile_start(x.bias, tile, -__builtin_inff(), start);
        if (out.bias != nullptr && opens) clear(out.bias + tile.first, tile.n);
        if (out.h != nullptr && tile.opens) clear(group_h, round_up(n, kRows) * w.width);
        for (int64_t t0 = 0; t0 < n; t0 += kBlock) {
            const int64_t count = min(kBlock, n - t0), lanes = round_up(count, kCols);
            float* p = kKept ? w.kept + tile.index * kTile * kBlock : space;
            if (kKept) {
                const float* top = w.tops + tile.index * kBlock;
                for (int64_t t = 0; t < lanes; t += kFloats) {
                    store(scale + t, exp(load(top + t) - load(w.lse + t0 + t)) * load(w.weight + t0 + t));
                }
                for (int64_t v = 0; v < tile.padded; ++v) {
                    for (int64_t t = 0; t < lanes; t += kFloats) {
                        store(p + v * kBlock + t, load(p + v * kBlock + t) * load(scale + t));
                    }
                }
            } else {
                for (int64_t t = 0; t < lanes; t += kCols) {
                    multiply(items, w.width, tile.padded, w.across_h + (t0 + t) * x.D, x.D, start, p + t, kBlock);
                }
                for (int64_t v = 0; v < tile.padded; ++v) {
                    for (int64_t t = 0; t < lanes; t += kFloats) {
                        const vfloat probability = exp(load(p + v * kBlock + t) - load(w.lse + t0 + t));
                        store(p + v * kBlock + t, probability * load(w.weight + t0 + t));
                    }
                }
            }
            for_each_target(target, t0, t0 + count, tile,
                            [&](int64_t v, int64_t t) { p[v * kBlock + t - t0] -= w.weight[t]; });
            if (out.h != nullptr) add_to_rows(p, items, tile.n, count, w.width, group_h + t0 * w.width);
            if (out.table != nullptr) {
                add_to_items(p, w.along_h + t0 * w.width, tile.padded, count, w.width, grad_items);
            }
            if (out.bias != nullptr) add_to_bias(p, tile.n, lanes, out.bias + tile.first);
        }
        close_gradient(grad_items, out.table, tile, x.D, w.width);
    });
}

// A call without rows writes no tile.
inline void clear_items(const LinearLogits& x, const LinearGradients& out) {
    if (out.table != nullptr) clear(out.table, x.V * x.D);
    if (out.bias != nullptr) clear(out.bias, x.V);
}

inline bool any(const LinearGradients& out) { return out.h != nullptr || out.table != nullptr || out.bias != nullptr; }

}  // namespace

int64_t linear_cross_entropy_scratch(const LinearLogits& x, LinearPass pass) {
    const int64_t floats = Workspace(x, pass, nullptr).floats;
    if (pass != LinearPass::sum) return floats;
    // without gradients, or without room for exponentials, a sum is made of the other passes
    const int64_t apart = Workspace(x, LinearPass::backward, nullptr).floats;
    return floats > apart ? floats : apart;
}

void linear_cross_entropy_forward(const LinearLogits& x, float* loss, float* lse, float* scratch) {
    const Workspace w(x, LinearPass::forward, scratch);
    const int64_t chosen = choose_rows(x, nullptr, w);
    for (int64_t first = 0; first < chosen; first += w.rows) {
        const int64_t n = min(w.rows, chosen - first);
        pack_across(x.h, w.row + first, n, x.D, w.across_h);
        gather_softmax<false>(x, w, w.target + first, n);
        finish_softmax(x, w, w.row + first, n, loss, lse);
    }
    clear_other_rows(w, chosen, x.T, 1, loss);
    clear_other_rows(w, chosen, x.T, 1, lse);
}

void linear_cross_entropy_backward(const LinearLogits& x, const float* lse, const float* grad,
                                   const LinearGradients& out, float* scratch) {
    const Workspace w(x, LinearPass::backward, scratch);
    const int64_t chosen = choose_rows(x, grad, w);
    if (chosen == 0) clear_items(x, out);
    for (int64_t first = 0; first < chosen; first += w.rows) {
        const int64_t n = min(w.rows, chosen - first);
        const int64_t* row = w.row + first;
        pack_across(x.h, row, n, x.D, w.across_h);
        pack_along(x.h, row, n, x.D, w.width, w.along_h);
        gather(lse, row, n, w.rows, FLT_MAX, w.lse);  // probability 0 whatever the bias
        gather(grad, row, n, w.rows, 0.0f, w.weight);
        gather_gradients<false>(x, w, w.target + first, n, first == 0, out);
        if (out.h != nullptr) write_rows(x, w, row, n, out.h);
    }
    clear_other_rows(w, chosen, x.T, x.D, out.h);
}

void linear_cross_entropy_sum(const LinearLogits& x, const float* weight, float* total, float* loss, float* lse,
                              const LinearGradients& out, float* scratch) {
    if (!any(out) || !keeps_exponentials(x)) {
        linear_cross_entropy_forward(x, loss, lse, scratch);
        if (any(out)) linear_cross_entropy_backward(x, lse, weight, out, scratch);
    } else {
        const Workspace w(x, LinearPass::sum, scratch);
        const int64_t chosen = choose_rows(x, nullptr, w);
        if (chosen == 0) clear_items(x, out);
        for (int64_t first = 0; first < chosen; first += w.rows) {
            const int64_t n = min(w.rows, chosen - first);
            const int64_t *row = w.row + first, *target = w.target + first;
            pack_across(x.h, row, n, x.D, w.across_h);
            pack_along(x.h, row, n, x.D, w.width, w.along_h);
            gather(weight, row, n, w.rows, 0.0f, w.weight);
            gather_softmax<true>(x, w, target, n);
            finish_softmax(x, w, row, n, loss, lse);
            gather_gradients<true>(x, w, target, n, first == 0, out);
            if (out.h != nullptr) write_rows(x, w, row, n, out.h);
        }
        clear_other_rows(w, chosen, x.T, 1, loss);
        clear_other_rows(w, chosen, x.T, 1, lse);
        clear_other_rows(w, chosen, x.T, x.D, out.h);
    }
    double sum = 0;
    for (int64_t t = 0; t < x.T; ++t) sum += static_cast<double>(weight[t]) * loss[t];
    *total = static_cast<float>(sum);
}

void linear_cross_entropy_double_backward(const LinearLogits& x, const float* lse, const float* grad,
                                          const LinearGradients& by, float* grad_grad, const LinearGradients& out,
                                          float* scratch) {
    // With P the probabilities, Y the one-hot targets and Q = u table' + h w' + c' the change of the logits,
    // (u, w, c) = by:
    //   A = grad (P - Y),  B = grad P (Q - q),  q[t] = sum_v P[t, v] Q[t, v]
    //   grad_grad = q - Q[., target],  grad_h = B table + A w,  grad_table = B' h + A' u,  grad_bias = B' 1
    const Workspace w(x, LinearPass::double_backward, scratch);
    const int64_t groups = group_count(x.V), chosen = choose_rows(x, nullptr, w);
    if (chosen == 0) clear_items(x, out);

    // Calls work(tile, items of the table, items of by.table, first row, number of rows, P before exp, Q) for every
    // tile and every few rows of a block of n rows.
    const auto for_each_part = [&](int64_t n, auto open, auto work, auto close) {
        for_each_tile(x, n, [&](const Tile& tile) {
            alignas(64) float p[kTile * kBlock], q[kTile * kBlock], start[kTile], start_q[kTile];
            const int64_t at = tile.group * kTile * w.width;
            const float* items = tile_rows(x.table, tile, x.D, w.width, w.items + at);
            const float* items_w =
                by.table == nullptr ? nullptr : tile_rows(by.table, tile, x.D, w.width, w.items_w + at);
            tile_start(x.bias, tile, -__builtin_inff(), start);
            tile_start(by.bias, tile, 0.0f, start_q);
            float* grad_items = open(tile);
            for (int64_t t0 = 0; t0 < n; t0 += kBlock) {
                const int64_t count = min(kBlock, n - t0);
                for (int64_t t = 0; t < count; t += kCols) {
                    const float* h = w.across_h + (t0 + t) * x.D;
                    const float* u = w.across_u + (t0 + t) * x.D;
                    multiply(items, w.width, tile.padded, h, x.D, start, p + t, kBlock);
                    for (int64_t v = 0; v < tile.padded; ++v) {
                        store(q + v * kBlock + t, broadcast(start_q[v]));
                        store(q + v * kBlock + t + kFloats, broadcast(start_q[v]));
                    }
                    if (by.h != nullptr) multiply(items, w.width, tile.padded, u, x.D, nullptr, q + t, kBlock);
                    if (by.table != nullptr) multiply(items_w, w.width, tile.padded, h, x.D, nullptr, q + t, kBlock);
                }
                work(tile, items, items_w, grad_items, t0, count, p, q);
            }
            close(tile, grad_items);
        });
    };

    for (int64_t first = 0; first < chosen; first += w.rows) {
        const int64_t n = min(w.rows, chosen - first);
        const int64_t *row = w.row + first, *target = w.target + first;
        pack_across(x.h, row, n, x.D, w.across_h);
        pack_along(x.h, row, n, x.D, w.width, w.along_h);
        if (by.h != nullptr) {
            pack_across(by.h, row, n, x.D, w.across_u);
            pack_along(by.h, row, n, x.D, w.width, w.along_u);
        }
        gather(lse, row, n, w.rows, FLT_MAX, w.lse);
        gather(grad, row, n, w.rows, 0.0f, w.weight);
        float* target_change = w.target_logit;
        float* group_mean = w.group_sum;

        for_each_part(
            n,
            [&](const Tile& tile) -> float* {
                if (tile.opens) clear(group_mean + tile.group * w.rows, w.rows);
                return nullptr;
            },
            [&](const Tile& tile, const float*, const float*, float*, int64_t t0, int64_t count, float* p, float* q) {
                float* mean = group_mean + tile.group * w.rows + t0;
                for (int64_t t = 0; t < count; t += kFloats) {
                    vfloat sum = load(mean + t);
                    for (int64_t v = 0; v < tile.padded; ++v) {
                        sum += exp(load(p + v * kBlock + t) - load(w.lse + t0 + t)) * load(q + v * kBlock + t);
                    }
                    store(mean + t, sum);
                }
                for_each_target(target, t0, t0 + count, tile,
                                [&](int64_t v, int64_t t) { target_change[t] = q[v * kBlock + t - t0]; });
            },
            [](const Tile&, float*) {});
        for (int64_t t = 0; t < w.rows; ++t) {
            w.mean[t] = 0.0f;
            for (int64_t group = 0; group < groups && t < n; ++group) w.mean[t] += group_mean[group * w.rows + t];
            if (grad_grad != nullptr && t < n) grad_grad[row[t]] = w.mean[t] - target_change[t];
        }
        if (!any(out)) continue;

        for_each_part(
            n,
            [&](const Tile& tile) {
                if (out.bias != nullptr && first == 0) clear(out.bias + tile.first, tile.n);
                if (out.h != nullptr && tile.opens) {
                    clear(w.group_h + tile.group * w.rows * w.width, round_up(n, kRows) * w.width);
                }
                return open_gradient(out.table, tile, x.D, w.width, first == 0,
                                     w.tile_grad + tile.group * kTile * w.width);
            },
            [&](const Tile& tile, const float* items, const float* items_w, float* grad_items, int64_t t0,
                int64_t count, float* p, float* q) {
                for (int64_t v = 0; v < tile.padded; ++v) {
                    for (int64_t t = 0; t < count; t += kFloats) {
                        const int64_t at = v * kBlock + t;
                        const vfloat a = exp(load(p + at) - load(w.lse + t0 + t)) * load(w.weight + t0 + t);
                        store(p + at, a);
                        store(q + at, a * (load(q + at) - load(w.mean + t0 + t)));
                    }
                }
                for_each_target(target, t0, t0 + count, tile,
                                [&](int64_t v, int64_t t) { p[v * kBlock + t - t0] -= w.weight[t]; });
                if (out.h != nullptr) {
                    float* sum = w.group_h + (tile.group * w.rows + t0) * w.width;
                    add_to_rows(q, items, tile.n, count, w.width, sum);
                    if (by.table != nullptr) add_to_rows(p, items_w, tile.n, count, w.width, sum);
                }
                if (out.table != nullptr) {
                    const int64_t at = t0 * w.width;
                    add_to_items(q, w.along_h + at, tile.padded, count, w.width, grad_items);
                    if (by.h != nullptr) {
                        add_to_items(p, w.along_u + at, tile.padded, count, w.width, grad_items);
                    }
                }
                if (out.bias != nullptr) {
                    add_to_bias(q, tile.n, round_up(count, kFloats), out.bias + tile.first);
                }
            },
            [&](const Tile& tile, float* grad_items) { close_gradient(grad_items, out.table, tile, x.D, w.width); });
        if (out.h != nullptr) write_rows(x, w, row, n, out.h);
    }
    clear_other_rows(w, chosen, x.T, 1, grad_grad);
    clear_other_rows(w, chosen, x.T, x.D, out.h);
}

}  // namespace metarec::METAREC_ISA
