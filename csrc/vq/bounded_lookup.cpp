// Nearest codewords of rows that come back: bounds prove that most codes cannot have become the nearest.
//
// When a row is searched in full, its place a, its `list` nearest codes and their distances are kept. Later the row is
// at x and code k has moved by at most p_k, so that by the triangle inequality
//     ||a - c_k|| - ||x - a|| - p_k <= ||x - c_k|| <= ||a - c_k|| + ||x - a|| + p_k.
// (Hamerly 2010 and Elkan 2003 for k-means; the list is Drake and Hamerly's, 2012. They add up how far a row's bounds
// drift; ||x - a|| is exact and does not grow when a row comes back.) p_k is the difference of two values of `path`,
// the running sum of the code's steps, so one number a code serves rows searched at any time. Codes outside the list
// share one bound and move by at most the difference of two values of `sweep`. A code whose step is far above the
// head's mean, such as a dead code that was replaced, jumps: its step is left out of `sweep`, and instead it is
// compared with every row that was searched before the jump.
//
// A row costs its distance from a, and no more if the bounds alone name its code; else the distance of that code and of
// those whose lower bound does not exceed the least distance found. It is searched in full if the shared bound fails,
// or when a visit costs more than the mean since the last full search: the renewal-reward rule for replacing what
// wears.
//
// Rounding. Rows and codes are float32 and distances are computed in float64, so that no square under- or overflows and
// a squared distance errs by at most dim + 2 units of 2^-53 of itself, whatever the order of the sum. Roots, and what
// is stored, are rounded outwards. A difference of stored numbers errs by 2^-53 of itself, so `clears` demands more
// than those errors in total, and more than the definition's own float64 rounding. Codes closer than that are one and
// the same code twice, then the lower index is right, or the row is left to the referee.
#include "vq/bounded_lookup.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include "core/vec.h"

namespace metarec::METAREC_ISA {
namespace {

constexpr double kInfinity = __builtin_inf();
constexpr float kMaxFloat = __FLT_MAX__;
constexpr int kAtOnce = 4;  // rows that are searched in full together
constexpr int kDoubles = METAREC_VECTOR_BYTES / 8, kVectors = 2;
constexpr int kCodes = kVectors * kDoubles;       // and codes of a panel
constexpr int64_t kUndecided = -1, kSearch = -2;  // in place of an index

typedef double vdouble __attribute__((vector_size(METAREC_VECTOR_BYTES)));
typedef float vhalf __attribute__((vector_size(METAREC_VECTOR_BYTES / 2)));

inline vdouble widen(const float* p) {
    vhalf v;
    std::memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, vdouble);
}

inline double squared_distance(const float* a, const float* b, int64_t dim) {
    double total = 0;
    int64_t d = 0;
    if (dim >= kDoubles) {
        vdouble sum = {};
        for (; d + kDoubles <= dim; d += kDoubles) {
            const vdouble difference = widen(a + d) - widen(b + d);
            sum += difference * difference;
        }
        for (int lane = 0; lane < kDoubles; ++lane) total += sum[lane];
    }
    for (; d < dim; ++d) {
        const double difference = static_cast<double>(a[d]) - static_cast<double>(b[d]);
        total += difference * difference;
    }
    return total;
}

inline float round_down(double value) {
    if (value > kMaxFloat) return kMaxFloat;
    const float nearest = static_cast<float>(value);
    return static_cast<double>(nearest) > value ? __builtin_nextafterf(nearest, -__builtin_inff()) : nearest;
}

inline float round_up(double value) {
    if (value > kMaxFloat) return __builtin_inff();
    if (value < -kMaxFloat) return -kMaxFloat;
    const float nearest = static_cast<float>(value);
    return static_cast<double>(nearest) < value ? __builtin_nextafterf(nearest, __builtin_inff()) : nearest;
}

inline bool equal_codes(const float* a, const float* b, int64_t dim) {
    for (int64_t d = 0; d < dim; ++d) {
        if (a[d] != b[d]) return false;
    }
    return true;
}

// Relative slack: several times what a squared distance, its root and a few operations on it lose.
inline double slack(int64_t dim) { return static_cast<double>(dim + 16) * 0x1p-51; }

struct Lookup {
    const RowBounds& bounds;
    const int64_t* ids;
    const float *x, *codebook, *packed;
    int64_t count, version;
    int64_t* indices;
    double relative;

    const float* row(int64_t h, int64_t n) const { return x + (h * count + n) * bounds.dim; }
    const float* code(int64_t h, int64_t k) const { return codebook + (h * bounds.codes + k) * bounds.dim; }
    // Whether a distance of at most `upper` is below one of at least `lower`, for bounds that `moved` went into.
    bool clears(double upper, double lower, double moved) const {
        return upper * (1 + relative) + relative * moved < lower * (1 - relative);
    }
};

// The least of the squared distances offered so far.
struct Best {
    double square, root;  // root: at least the distance
    int64_t index;
    bool tied;  // another code may be as near
};

inline void offer(const Lookup& lookup, int64_t h, Best* best, int64_t k, double square) {
    if (k == best->index || square > best->square * (1 + lookup.relative)) return;
    const bool clear = square < best->square * (1 - lookup.relative);
    if (!clear && equal_codes(lookup.code(h, k), lookup.code(h, best->index), lookup.bounds.dim)) {
        if (k < best->index) best->index = k;
        return;
    }
    best->tied = !clear;
    if (square < best->square) {
        best->index = k;
        best->square = square;
        best->root = __builtin_sqrt(square) * (1 + lookup.relative);
    }
}

// Rows of one head that wait to be searched in full.
struct Waiting {
    int count;
    int64_t n[kAtOnce];
    double* row;       // [dim, kAtOnce] the rows
    double* square;    // [kAtOnce, padded codes] their squared distances
    double* least;     // [list + 1] the least of a row's, in order ...
    int64_t* nearest;  // [list + 1] ... and whose they are
};

inline int64_t padded(int64_t codes) { return (codes + kCodes - 1) / kCodes * kCodes; }

void all_distances(const Lookup& lookup, int64_t h, Waiting* waiting) {
    const int64_t K = lookup.bounds.codes, D = lookup.bounds.dim;
    const float* panel = lookup.packed + h * padded(K) * D;
    for (int r = 0; r < kAtOnce; ++r) {
        const float* row = lookup.row(h, waiting->n[r < waiting->count ? r : 0]);
        for (int64_t d = 0; d < D; ++d) waiting->row[d * kAtOnce + r] = row[d];
    }
    for (int64_t k = 0; k < K; k += kCodes, panel += kCodes * D) {
        vdouble sum[kAtOnce][kVectors] = {};
        for (int64_t d = 0; d < D; ++d) {
            vdouble code[kVectors];
            for (int v = 0; v < kVectors; ++v) code[v] = widen(panel + d * kCodes + v * kDoubles);
            for (int r = 0; r < kAtOnce; ++r) {
                const vdouble value = waiting->row[d * kAtOnce + r] - vdouble{};
                for (int v = 0; v < kVectors; ++v) {
                    const vdouble difference = value - code[v];
                    sum[r][v] += difference * difference;
                }
            }
        }
        for (int r = 0; r < kAtOnce; ++r) std::memcpy(waiting->square + r * padded(K) + k, sum[r], sizeof sum[r]);
    }
}

// The list + 1 least of a row's squared distances, equal ones in the order of their codes; infinite where codes lack.
void select_least(const double* square, int64_t codes, int64_t count, double* least, int64_t* nearest) {
    for (int64_t j = 0; j < count; ++j) {
        least[j] = kInfinity;
        nearest[j] = -1;
    }
    for (int64_t k = 0; k < codes; ++k) {
        const double value = square[k];
        if (!(value < least[count - 1])) continue;
        int64_t j = count - 1;
        for (; j > 0 && value < least[j - 1]; --j) {
            least[j] = least[j - 1];
            nearest[j] = nearest[j - 1];
        }
        least[j] = value;
        nearest[j] = k;
    }
}

// Search the waiting rows in full and start their bounds anew.
void search_in_full(const Lookup& lookup, int64_t h, Waiting* waiting, Work* work) {
    const RowBounds& bounds = lookup.bounds;
    const int64_t K = bounds.codes, D = bounds.dim, B = bounds.list;
    const double wide = 1 + lookup.relative, narrow = 1 - lookup.relative;
    if (waiting->count == 0) return;
    all_distances(lookup, h, waiting);
    work->distances += waiting->count * K;
    work->searched += waiting->count;
    for (int r = 0; r < waiting->count; ++r) {
        const int64_t n = waiting->n[r], at = h * bounds.rows + lookup.ids[n];
        const double* square = waiting->square + r * padded(K);
        if (square[0] - square[0] != 0) {  // the codes are finite, so the row is not
            lookup.indices[h * lookup.count + n] = kUndecided;
            continue;
        }
        select_least(square, K, B + 1, waiting->least, waiting->nearest);
        const int64_t index = waiting->nearest[0];
        bool tied = false;
        const double limit = waiting->least[0] * wide;
        if (waiting->least[1] <= limit) {
            for (int64_t k = 0; k < K && !tied; ++k) {
                tied = square[k] <= limit && k != index && !equal_codes(lookup.code(h, k), lookup.code(h, index), D);
            }
        }
        // of equal codes, which have equal distances, the first is in front
        lookup.indices[h * lookup.count + n] = tied ? kUndecided : index;

        std::memcpy(bounds.anchor + at * D, lookup.row(h, n), D * sizeof(float));
        const double* path = bounds.path + h * K;
        for (int64_t j = 0; j < B; ++j) {
            const int64_t k = waiting->nearest[j];
            const double distance = __builtin_sqrt(waiting->least[j]) * narrow;
            bounds.code[at * B + j] = static_cast<int32_t>(k);
            bounds.key[at * B + j] = round_down((distance + path[k]) * narrow);
        }
        const double upper = __builtin_sqrt(waiting->least[0]) * wide - path[index];
        bounds.upper[at] = round_up(upper + (upper < 0 ? -upper : upper) * lookup.relative);
        bounds.rest[at] = B == K ? __builtin_inff()
                                 : round_down((__builtin_sqrt(waiting->least[B]) * narrow + bounds.sweep[h]) * narrow);
        bounds.version[at] = lookup.version;
        bounds.visits[at] = 1;
        bounds.spent[at] = static_cast<float>(K);
    }
    waiting->count = 0;
}

// Leaves kSearch in place of the index if the row has to be searched in full.
void decide_by_bounds(const Lookup& lookup, int64_t h, int64_t n, Work* work) {
    const RowBounds& bounds = lookup.bounds;
    const int64_t D = bounds.dim, B = bounds.list, at = h * bounds.rows + lookup.ids[n], since = bounds.version[at];
    int64_t& index = lookup.indices[h * lookup.count + n];
    const float* row = lookup.row(h, n);
    const double* path = bounds.path + h * bounds.codes;
    const int32_t* code = bounds.code + at * B;
    const float* key = bounds.key + at * B;

    index = kSearch;
    if (since < 0) return;
    const double square = squared_distance(row, bounds.anchor + at * D, D);
    int64_t cost = 1;
    ++work->distances;
    if (square - square != 0) {  // the anchor is finite, so the row is not
        index = kUndecided;
        return;
    }
    const double moved = __builtin_sqrt(square) * (1 + lookup.relative);
    const double rest = static_cast<double>(bounds.rest[at]) - bounds.sweep[h] - moved;
    const int32_t* recent = bounds.recent + h * bounds.codes;
    const int64_t* jumped = bounds.jumped + h * bounds.codes;
    const int64_t recent_count = bounds.recent_count[h];
    const bool jumps = recent_count > 0 && jumped[recent[0]] > since;

    double least_other = rest;
    for (int64_t j = 1; j < B; ++j) {
        const double lower = static_cast<double>(key[j]) - path[code[j]] - moved;
        if (lower < least_other) least_other = lower;
    }
    const double upper = static_cast<double>(bounds.upper[at]) + path[code[0]] + moved;
    if (!jumps && lookup.clears(upper, least_other, moved)) {
        index = code[0];
        ++work->proven;
    } else {
        const float affordable = bounds.spent[at] / bounds.visits[at];
        Best best;
        best.index = code[0];
        best.square = squared_distance(row, lookup.code(h, code[0]), D);
        best.root = __builtin_sqrt(best.square) * (1 + lookup.relative);
        best.tied = false;
        int64_t compared = 1;
        for (int64_t j = 1; j < B; ++j) {
            const double lower = static_cast<double>(key[j]) - path[code[j]] - moved;
            if (lookup.clears(best.root, lower, moved)) continue;
            offer(lookup, h, &best, code[j], squared_distance(row, lookup.code(h, code[j]), D));
            ++compared;
        }
        for (int64_t j = 0; j < recent_count && jumped[recent[j]] > since && compared < affordable; ++j) {
            offer(lookup, h, &best, recent[j], squared_distance(row, lookup.code(h, recent[j]), D));
            ++compared;
        }
        cost += compared;
        work->distances += compared;
        if (static_cast<float>(cost) > affordable || !lookup.clears(best.root, rest, moved)) return;
        index = best.tied ? kUndecided : best.index;
    }
    bounds.visits[at] += 1;
    bounds.spent[at] += static_cast<float>(cost);
}

// Whether a row of the table is this thread's: all its visits are, in their order.
inline bool mine(int64_t id) {
#ifdef _OPENMP
    return id % omp_get_num_threads() == omp_get_thread_num();
#else
    return id == id;
#endif
}

}  // namespace

bool code_drift(const RowBounds& bounds, const float* codebook, double* drift) {
    const double wide = 1 + slack(bounds.dim);
    bool finite = true;
    for (int64_t k = 0; k < bounds.heads * bounds.codes; ++k) {
        const double square = squared_distance(codebook + k * bounds.dim, bounds.previous + k * bounds.dim, bounds.dim);
        finite = finite && square - square == 0;
        drift[k] = __builtin_sqrt(square) * wide;
    }
    return finite;
}

int64_t bounded_lookup_scratch(const RowBounds& bounds) {
    return kAtOnce * (padded(bounds.codes) + bounds.dim) + 2 * (bounds.list + 1);
}

int64_t packed_codes(int64_t codes) { return padded(codes); }

int64_t lookup_by_bounds(const RowBounds& bounds, const int64_t* ids, const float* x, const float* codebook,
                         int64_t count, int64_t version, int threads, int64_t* indices, Work* work) {
    const Lookup lookup = {bounds, ids, x, codebook, nullptr, count, version, indices, slack(bounds.dim)};
    int64_t distances = 0, proven = 0, open = 0;
#pragma omp parallel num_threads(threads) reduction(+ : distances, proven, open)
    {
        Work own = {0, 0, 0};
        for (int64_t h = 0; h < bounds.heads; ++h) {
            for (int64_t n = 0; n < count; ++n) {
                if (!mine(ids[n])) continue;
                decide_by_bounds(lookup, h, n, &own);
                open += indices[h * count + n] == kSearch;
            }
        }
        distances += own.distances;
        proven += own.proven;
    }
    work->distances += distances;
    work->proven += proven;
    return open;
}

void search_the_rest(const RowBounds& bounds, const int64_t* ids, const float* x, const float* codebook, int64_t count,
                     int64_t version, int threads, float* packed, double* scratch, int64_t* indices, Work* work) {
    const Lookup lookup = {bounds, ids, x, codebook, packed, count, version, indices, slack(bounds.dim)};
    const int64_t K = bounds.codes, D = bounds.dim, panels = padded(K) / kCodes;
    int64_t distances = 0, proven = 0, searched = 0;
#pragma omp parallel num_threads(threads) reduction(+ : distances, proven, searched)
    {
#pragma omp for schedule(static)
        for (int64_t p = 0; p < bounds.heads * panels; ++p) {
            const int64_t h = p / panels, first = p % panels * kCodes;
            float* panel = packed + p * kCodes * D;
            for (int64_t j = 0; j < kCodes; ++j) {
                const float* code = lookup.code(h, first + j < K ? first + j : first);
                for (int64_t d = 0; d < D; ++d) panel[d * kCodes + j] = code[d];
            }
        }
#ifdef _OPENMP
        double* room = scratch + omp_get_thread_num() * bounded_lookup_scratch(bounds);
#else
        double* room = scratch;
#endif
        double* square = room + kAtOnce * D;
        double* least = square + kAtOnce * padded(K);
        Work own = {0, 0, 0};
        Waiting waiting = {0, {}, room, square, least, reinterpret_cast<int64_t*>(least + bounds.list + 1)};
        for (int64_t h = 0; h < bounds.heads; ++h) {
            for (int64_t n = 0; n < count; ++n) {
                if (indices[h * count + n] != kSearch || !mine(ids[n])) continue;
                // a row that comes again is known once it has been searched
                for (int w = 0; w < waiting.count; ++w) {
                    if (ids[waiting.n[w]] == ids[n]) search_in_full(lookup, h, &waiting, &own);
                }
                if (bounds.version[h * bounds.rows + ids[n]] == version) decide_by_bounds(lookup, h, n, &own);
                if (indices[h * count + n] != kSearch) continue;
                waiting.n[waiting.count++] = n;
                if (waiting.count == kAtOnce) search_in_full(lookup, h, &waiting, &own);
            }
            search_in_full(lookup, h, &waiting, &own);
        }
        distances += own.distances;
        proven += own.proven;
        searched += own.searched;
    }
    work->distances += distances;
    work->proven += proven;
    work->searched += searched;
}

}  // namespace metarec::METAREC_ISA
