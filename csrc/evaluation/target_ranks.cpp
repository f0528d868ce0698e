// Tiles of items pass over blocks of rows. A vector holds the scores of as many rows for one item, so that rows are
// packed once per block, items are read where they lie, and counts stay in the lanes of their rows.
#include "evaluation/target_ranks.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include "core/vec.h"
#include "evaluation/screen.h"

namespace metarec::METAREC_ISA {
namespace {

// kItems x 2 vectors of sums stay in registers: 24 of the 32 of AVX-512, 12 of 16 elsewhere.
#if defined(METAREC_ISA_avx512)
constexpr int kItems = 12;
#else
constexpr int kItems = 6;
#endif
constexpr int64_t kBlockBytes = 1 << 19;  // of packed rows, which stay in L2
constexpr int64_t kTileBytes = 1 << 14;   // of items, which stay in L1 with the rows of a panel
constexpr int64_t kGroupItems = 8192;     // a task is a block of rows and so many items
constexpr int64_t kChains = 8;            // scores computed side by side, each of them a chain of sums

template <typename T>
struct Lanes;
template <>
struct Lanes<float> {
    typedef vfloat vector;
    typedef vint counts;
    typedef int32_t count;
};
template <>
struct Lanes<double> {
    typedef vdouble vector;
    typedef int64_t counts __attribute__((vector_size(METAREC_VECTOR_BYTES)));
    typedef int64_t count;
};
template <typename T>
constexpr int64_t kLanes = METAREC_VECTOR_BYTES / sizeof(T);
template <typename T>
constexpr int64_t kPanel = 2 * kLanes<T>;  // rows of a panel

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements of T that fit, as whole units, at least one of them.
template <typename T>
inline int64_t fitting(int64_t bytes, int64_t D, int64_t unit) {
    const int64_t units = bytes / (unit * (D > 0 ? D : 1) * static_cast<int64_t>(sizeof(T)));
    return units < 1 ? unit : units * unit;
}
template <typename T>
inline int64_t block_rows(int64_t D) {
    return min(fitting<T>(kBlockBytes, D, kPanel<T>), 2048);
}

#if defined(METAREC_PAIRS)
inline int64_t screen_tile(int64_t D) { return fitting<float>(kTileBytes, screen_words(D, true), kScreenItems); }
#endif

// What a thread works with. Counts of a block's rows are kept by lane; those of the target's own score are `greater`.
template <typename T>
struct Workspace {
    T* rows;  // [panels, D, kPanel]
    T* own;   // [rows] the scores of the targets
    typename Lanes<T>::count* greater;
    typename Lanes<T>::count* at_least;
    typename Lanes<T>::count* finite;
    Screen screen;  // float32 alone
    uint64_t* met;  // a bit an item, all zero between cases
    int64_t bytes;
};

template <typename T>
inline Workspace<T> carve(void* memory, int64_t V, int64_t D) {
    int64_t used = 0;
    auto take = [&](int64_t elements, int64_t size) {
        char* at = static_cast<char*>(memory) + used;
        used += ceil_div(elements * size, 64) * 64;
        return at;
    };
    const int64_t rows = block_rows<T>(D);
    Workspace<T> w;
    w.rows = reinterpret_cast<T*>(take(rows * D, sizeof(T)));
    w.own = reinterpret_cast<T*>(take(rows, sizeof(T)));
    w.greater = reinterpret_cast<typename Lanes<T>::count*>(take(rows, sizeof(T)));
    w.at_least = reinterpret_cast<typename Lanes<T>::count*>(take(rows, sizeof(T)));
    w.finite = reinterpret_cast<typename Lanes<T>::count*>(take(rows, sizeof(T)));
    w.screen = {};
#if defined(METAREC_PAIRS)
    if constexpr (sizeof(T) == 4) {
        w.screen.scale = reinterpret_cast<float*>(take(rows, 4));
        w.screen.norm = reinterpret_cast<float*>(take(rows, 4));
        w.screen.low = reinterpret_cast<int32_t*>(take(rows, 4));
        w.screen.high = reinterpret_cast<int32_t*>(take(rows, 4));
        w.screen.higher = reinterpret_cast<int32_t*>(take(rows, 4));
        w.screen.rows = reinterpret_cast<int32_t*>(w.rows);
        const int64_t items = screen_tile(D);
        w.screen.items = reinterpret_cast<int32_t*>(take(items * screen_words(D, true), 4));
        w.screen.doubts = reinterpret_cast<Doubt*>(take(items * kScreenRows + kChains, sizeof(Doubt)));
    }
#endif
    w.met = reinterpret_cast<uint64_t*>(take(ceil_div(V, 64), 8));
    w.bytes = used;
    return w;
}

template <typename T>
inline bool is_finite(T x) {
    return x - x == 0;
}

// The scores of up to kChains pairs of a row of h and an item.
template <typename T, typename Row, typename Item>
inline void scores_of(const RankProblem<T>& p, Row row, Item item, int64_t count, T* out) {
    const T* x[kChains];
    const T* y[kChains];
    T sum[kChains];
    for (int64_t j = 0; j < kChains; ++j) {
        const int64_t pair = j < count ? j : 0;
        x[j] = p.h + row(pair) * p.D;
        y[j] = p.table + item(pair) * p.D;
        sum[j] = p.bias == nullptr ? 0 : p.bias[item(pair)];
    }
    for (int64_t d = 0; d < p.D; ++d) {
        for (int64_t j = 0; j < kChains; ++j) sum[j] = multiply_add(x[j][d], y[j][d], sum[j]);
    }
    for (int64_t j = 0; j < count; ++j) out[j] = sum[j];
}

// The scores of up to kChains items for one row.
template <typename T>
inline void scores_of_row(const RankProblem<T>& p, int64_t b, const int64_t* items, int64_t count, T* out) {
    scores_of(p, [&](int64_t) { return b; }, [&](int64_t j) { return items[j]; }, count, out);
}

// The term that belongs to an item of a case's rising list, or null.
template <typename T>
inline const T* find_term(const RankProblem<T>& p, int64_t b, int64_t item) {
    if (p.added.offsets == nullptr) return nullptr;
    int64_t low = p.added.offsets[b], high = p.added.offsets[b + 1];
    const int64_t end = high;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (p.added.items[middle] < item) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low < end && p.added.items[low] == item ? p.added_terms + low : nullptr;
}

template <typename T>
inline T own_score(const RankProblem<T>& p, int64_t b) {
    T own;
    scores_of_row(p, b, p.targets + b, 1, &own);
    const T* term = find_term(p, b, p.targets[b]);
    return term == nullptr ? own : own + *term;
}

template <typename T>
inline T sum_of_squares(const T* x, int64_t n) {
    typename Lanes<T>::vector sum = {};
    int64_t i = 0;
    for (; i + kLanes<T> <= n; i += kLanes<T>) sum += load(x + i) * load(x + i);
    T total = 0;
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) total += sum[lane];
    for (; i < n; ++i) total += x[i] * x[i];
    return total;
}

// Rows begin to end as panels; what is missing of the last one is zero.
template <typename T>
inline void pack_rows(const RankProblem<T>& p, int64_t begin, int64_t end, T* __restrict packed) {
    for (int64_t first = begin; first < end; first += kPanel<T>, packed += kPanel<T> * p.D) {
        for (int64_t r = 0; r < kPanel<T>; ++r) {
            const T* row = p.h + min(first + r, end - 1) * p.D;
            for (int64_t d = 0; d < p.D; ++d) packed[d * kPanel<T> + r] = first + r < end ? row[d] : 0;
        }
    }
}

template <typename Counts, typename Count>
inline Counts load_counts(const Count* p) {
    Counts v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// Counts the scores of N items for the rows of a panel.
template <typename T, int N, bool kChecks>
[[gnu::always_inline]] inline void count_items(const T* __restrict rows, const T* __restrict items, const T* bias,
                                               int64_t D, const T* own, typename Lanes<T>::count* greater,
                                               typename Lanes<T>::count* at_least, typename Lanes<T>::count* finite) {
    typedef typename Lanes<T>::vector vector;
    typedef typename Lanes<T>::counts counts;
    vector sum[N][2];
#pragma GCC unroll 12
    for (int i = 0; i < N; ++i) sum[i][0] = sum[i][1] = broadcast(bias == nullptr ? T(0) : bias[i]);
    for (int64_t d = 0; d < D; ++d, rows += kPanel<T>, ++items) {
        const vector x0 = load(rows), x1 = load(rows + kLanes<T>);
#pragma GCC unroll 12
        for (int i = 0; i < N; ++i) {
            const vector item = broadcast(items[i * D]);
            sum[i][0] = multiply_add(x0, item, sum[i][0]);
            sum[i][1] = multiply_add(x1, item, sum[i][1]);
        }
    }
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
        const int64_t at = j * kLanes<T>;
        const vector threshold = load(own + at);
        counts above = load_counts<counts>(greater + at), level = load_counts<counts>(at_least + at);
        counts sound = load_counts<counts>(finite + at);
#pragma GCC unroll 12
        for (int i = 0; i < N; ++i) {
            above -= sum[i][j] > threshold;
            level -= sum[i][j] >= threshold;
            if constexpr (kChecks) sound -= sum[i][j] - sum[i][j] == vector{};
        }
        std::memcpy(greater + at, &above, sizeof above);
        std::memcpy(at_least + at, &level, sizeof level);
        if constexpr (kChecks) std::memcpy(finite + at, &sound, sizeof sound);
    }
}

template <typename T, bool kChecks>
inline void count_tile(const RankProblem<T>& p, const Workspace<T>& w, int64_t rows, int64_t begin, int64_t end) {
    for (int64_t r = 0; r < rows; r += kPanel<T>) {
        const T* panel = w.rows + r * p.D;
        int64_t v = begin;
        for (; v + kItems <= end; v += kItems) {
            count_items<T, kItems, kChecks>(panel, p.table + v * p.D, p.bias == nullptr ? nullptr : p.bias + v, p.D,
                                            w.own + r, w.greater + r, w.at_least + r, w.finite + r);
        }
        for (; v < end; ++v) {
            count_items<T, 1, kChecks>(panel, p.table + v * p.D, p.bias == nullptr ? nullptr : p.bias + v, p.D,
                                       w.own + r, w.greater + r, w.at_least + r, w.finite + r);
        }
    }
}

// A score is at most the norms' product and the bias: if their squares are below this, none needs a look.
constexpr float kFar = 1e36f;

#if defined(METAREC_PAIRS)
// Computes the scores in doubt as they are defined, all of them or as many as fill the chains.
inline void refine(const RankProblem<float>& p, const Workspace<float>& w, int64_t row_begin, bool all, Screen& s) {
    float scores[kChains];
    int64_t done = 0;
    for (int64_t count; (count = min(s.num_doubts - done, kChains)) > (all ? 0 : kChains - 1); done += count) {
        const Doubt* doubts = s.doubts + done;
        scores_of(
            p, [&](int64_t j) { return row_begin + doubts[j].row; }, [&](int64_t j) { return doubts[j].item; }, count,
            scores);
        for (int64_t j = 0; j < count; ++j) {
            w.greater[doubts[j].row] += scores[j] > w.own[doubts[j].row];
            w.at_least[doubts[j].row] += scores[j] >= w.own[doubts[j].row];
        }
    }
    for (int64_t i = done; i < s.num_doubts; ++i) s.doubts[i - done] = s.doubts[i];
    s.num_doubts -= done;
}

// Counts items by integers as long as these tell most scores from the targets'; returns the first that is left.
inline int64_t screen_block(const RankProblem<float>& p, const Workspace<float>& w, int64_t row_begin, int64_t rows,
                            int64_t item_begin, int64_t item_end) {
    const bool has_bias = p.bias != nullptr;
    const int64_t dim = p.D + has_bias, words = screen_words(p.D, has_bias), tile = screen_tile(p.D);
    if (p.D < kScreenLeast || dim > kScreenMost || rows < kScreenRows) return item_begin;
    const float* bias = has_bias ? p.bias + item_begin : nullptr;
    const Size size = measure_items(p.table + item_begin * p.D, bias, item_end - item_begin, p.D);
    if (!(size.norm * size.norm < kFar)) return item_begin;
    Screen s = w.screen;
    pack_screen(p.h + row_begin * p.D, rows, p.D, has_bias, s);
    set_thresholds(w.own, rows, dim, size, s);
    int64_t v = item_begin;
    for (int64_t doubts = 0; v < item_end && doubts * 16 <= (v - item_begin) * rows;) {
        const int64_t count = min(tile, item_end - v);
        for (int64_t i = 0; i < count; ++i) {
            to_integers(p.table + (v + i) * p.D, p.D, has_bias, has_bias ? p.bias[v + i] : 0.0f, scale_of(size),
                        reinterpret_cast<int16_t*>(s.items + i * words));
        }
        for (int64_t r = 0; r < rows; r += kScreenRows) {
            const int32_t* panel = s.rows + r * words;
            const int64_t before = s.num_doubts;
            int64_t i = 0;
            for (; i + kScreenItems <= count; i += kScreenItems) {
                screen_items<kScreenItems>(panel, s.items + i * words, words, s.low + r, s.high + r, s.higher + r, r,
                                           v + i, s);
            }
            for (; i < count; ++i) {
                screen_items<1>(panel, s.items + i * words, words, s.low + r, s.high + r, s.higher + r, r, v + i, s);
            }
            doubts += s.num_doubts - before;
            refine(p, w, row_begin, false, s);
        }
        v += count;
    }
    refine(p, w, row_begin, true, s);
    for (int64_t r = 0; r < rows; ++r) {
        w.greater[r] += s.higher[r];
        w.at_least[r] += s.higher[r];
    }
    return v;
}
#endif

inline void add(int64_t* to, int64_t amount) {
#pragma omp atomic
    *to += amount;
}

// Counts of all items, in `equal` those at least as high.
template <typename T>
inline void count_block(const RankProblem<T>& p, const RankCounts& out, const Workspace<T>& w, int64_t row_begin,
                        int64_t row_end, int64_t item_begin, int64_t item_end) {
    const int64_t rows = row_end - row_begin, padded = ceil_div(rows, kPanel<T>) * kPanel<T>;
    for (int64_t r = 0; r < padded; ++r) {
        w.own[r] = r < rows ? own_score(p, row_begin + r) : 0;
        w.greater[r] = w.at_least[r] = w.finite[r] = 0;
    }
    const bool small_rows = sum_of_squares(p.h + row_begin * p.D, rows * p.D) < kFar;
    const int64_t tile = fitting<T>(kTileBytes, p.D, kItems);
    int64_t unchecked = 0, first = item_begin;
#if defined(METAREC_PAIRS)
    if constexpr (sizeof(T) == 4) {
        if (small_rows) first = screen_block(p, w, row_begin, rows, item_begin, item_end);
        unchecked = first - item_begin;
    }
#endif
    if (first < item_end) pack_rows(p, row_begin, row_end, w.rows);
    for (int64_t v = first; v < item_end; v += tile) {
        const int64_t end = min(v + tile, item_end);
        if (small_rows && sum_of_squares(p.table + v * p.D, (end - v) * p.D) < kFar &&
            (p.bias == nullptr || sum_of_squares(p.bias + v, end - v) < kFar)) {
            count_tile<T, false>(p, w, padded, v, end);
            unchecked += end - v;
        } else {
            count_tile<T, true>(p, w, padded, v, end);
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        add(out.greater + row_begin + r, w.greater[r]);
        add(out.equal + row_begin + r, w.at_least[r]);
        add(out.nonfinite + row_begin + r, item_end - item_begin - unchecked - w.finite[r]);
    }
}

// Takes back what no candidate added to the counts of a case, and counts the items with a term of their own again.
template <typename T>
inline void correct(const RankProblem<T>& p, const RankCounts& out, uint64_t* met, int64_t b) {
    const T own = own_score(p, b);
    int64_t greater = 0, at_least = 0, nonfinite = 0;
    auto count = [&](T score, int sign) {
        greater += score > own ? sign : 0;
        at_least += score >= own ? sign : 0;
    };
    auto bit = [](int64_t item) { return uint64_t{1} << (item & 63); };
    int64_t items[kChains];
    const T* terms[kChains];
    bool is_candidate[kChains];
    T scores[kChains];

    scores_of_row(p, b, p.targets + b, 1, scores);
    count(scores[0], -1);
    nonfinite += is_finite(scores[0]) - is_finite(own);
    met[p.targets[b] >> 6] |= bit(p.targets[b]);
    const int64_t seen_end = p.seen.offsets == nullptr ? 0 : p.seen.offsets[b + 1];
    for (int64_t i = p.seen.offsets == nullptr ? 0 : p.seen.offsets[b]; i < seen_end;) {
        int64_t taken = 0;
        for (; taken < kChains && i < seen_end; ++i) {
            const int64_t item = p.seen.items[i];
            if (met[item >> 6] & bit(item)) continue;
            met[item >> 6] |= bit(item);
            items[taken++] = item;
        }
        if (taken > 0) scores_of_row(p, b, items, taken, scores);
        for (int64_t j = 0; j < taken; ++j) count(scores[j], -1);
    }
    const int64_t added_end = p.added.offsets == nullptr ? 0 : p.added.offsets[b + 1];
    for (int64_t i = p.added.offsets == nullptr ? 0 : p.added.offsets[b]; i < added_end;) {
        int64_t taken = 0;
        for (; taken < kChains && i < added_end; ++i) {
            const int64_t item = p.added.items[i];
            if (item == p.targets[b]) continue;
            is_candidate[taken] = !(met[item >> 6] & bit(item));
            terms[taken] = p.added_terms + i;
            items[taken++] = item;
        }
        if (taken > 0) scores_of_row(p, b, items, taken, scores);
        for (int64_t j = 0; j < taken; ++j) {
            const T whole = scores[j] + *terms[j];
            nonfinite += is_finite(scores[j]) - is_finite(whole);  // of candidates and others
            if (!is_candidate[j]) continue;
            count(scores[j], -1);
            count(whole, 1);
        }
    }
    for (int64_t i = p.seen.offsets == nullptr ? 0 : p.seen.offsets[b]; i < seen_end; ++i) {
        met[p.seen.items[i] >> 6] = 0;
    }
    met[p.targets[b] >> 6] = 0;
    out.greater[b] += greater;
    out.equal[b] += at_least - out.greater[b];
    out.nonfinite[b] += nonfinite;
}

template <typename T>
inline void run(const RankProblem<T>& p, const RankCounts& out, int threads, void* scratch) {
    const int64_t bytes = carve<T>(nullptr, p.V, p.D).bytes;
    const int64_t most = block_rows<T>(p.D), blocks = ceil_div(p.B, most);
    const int64_t groups = ceil_div(p.V, kGroupItems);
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        char* mine = static_cast<char*>(scratch) + omp_get_thread_num() * bytes;
#else
        char* mine = static_cast<char*>(scratch);
#endif
        const Workspace<T> w = carve<T>(mine, p.V, p.D);
        for (int64_t i = 0; i < ceil_div(p.V, 64); ++i) w.met[i] = 0;
#pragma omp for schedule(static)
        for (int64_t b = 0; b < p.B; ++b) out.greater[b] = out.equal[b] = out.nonfinite[b] = 0;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < blocks * groups; ++task) {
            const int64_t block = task / groups, group = task % groups;
            count_block(p, out, w, p.B * block / blocks, p.B * (block + 1) / blocks, p.V * group / groups,
                        p.V * (group + 1) / groups);
        }
#pragma omp for schedule(dynamic, 64)
        for (int64_t b = 0; b < p.B; ++b) correct(p, out, w.met, b);
    }
}

}  // namespace

int64_t target_ranks_scratch(int64_t V, int64_t D) {
    const int64_t single = carve<float>(nullptr, V, D).bytes, twice = carve<double>(nullptr, V, D).bytes;
    return single > twice ? single : twice;
}

void target_ranks_f32(const RankProblem<float>& problem, const RankCounts& counts, int threads, void* scratch) {
    run(problem, counts, threads, scratch);
}

void target_ranks_f64(const RankProblem<double>& problem, const RankCounts& counts, int threads, void* scratch) {
    run(problem, counts, threads, scratch);
}

}  // namespace metarec::METAREC_ISA
