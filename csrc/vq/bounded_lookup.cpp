// Nearest codewords of rows that come back: bounds prove that most codes cannot have become the nearest.
//
// When a row is searched in full, its place a, its `list` nearest codes and their distances are kept. Later the row is
// at x and code k has moved by at most p_k, so that by the triangle inequality
//     ||a - c_k|| - p_k - ||x - a|| <= ||x - c_k|| <= ||a - c_k|| + p_k + ||x - a||.
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
// a squared distance errs by at most dim + 2 units of 2^-53 of itself, whatever the order of the sum. What is stored is
// rounded outwards, and a difference of stored numbers errs by 2^-53 of itself. So a code is excluded if its
// lower bound exceeds `reach`, the bound on the least distance with a relative slack of (dim + 16) 2^-51: more than all
// these errors and the definition's own float64 rounding together. Codes closer than the slack are one and the same
// code twice, then the lower index is right, or the row is left to the comparison by the definition.
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
constexpr int kCodes = kVectors * kDoubles;       // codes of a panel
constexpr int64_t kUndecided = -1, kSearch = -2;  // in place of an index

typedef double vdouble __attribute__((vector_size(METAREC_VECTOR_BYTES)));
typedef int64_t vlong __attribute__((vector_size(METAREC_VECTOR_BYTES)));
typedef float vhalf __attribute__((vector_size(METAREC_VECTOR_BYTES / 2)));

inline vdouble widen(const float* p) {
    vhalf v;
    std::memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, vdouble);
}

inline vdouble load_doubles(const double* p) {
    vdouble v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline double total(vdouble v) {
    // a tree of additions: lane after lane they would wait for each other
    double lane[kDoubles];
    std::memcpy(lane, &v, sizeof v);
#pragma GCC unroll 4
    for (int width = kDoubles / 2; width > 0; width /= 2) {
#pragma GCC unroll 4
        for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
    }
    return lane[0];
}

inline double squared_distance(const float* a, const float* b, int64_t dim) {
    double sum = 0;
    int64_t d = 0;
    if (dim >= kDoubles) {
        vdouble sums = {};
        for (; d + kDoubles <= dim; d += kDoubles) {
            const vdouble difference = widen(a + d) - widen(b + d);
            sums += difference * difference;
        }
        sum = total(sums);
    }
    for (; d < dim; ++d) {
        const double difference = static_cast<double>(a[d]) - static_cast<double>(b[d]);
        sum += difference * difference;
    }
    return sum;
}

// Of a value that is not negative.
inline float round_down(double value) {
    const float nearest = static_cast<float>(value < kMaxFloat ? value : kMaxFloat);
    int32_t bits;
    std::memcpy(&bits, &nearest, sizeof bits);
    bits -= static_cast<double>(nearest) > value;  // the float below
    float down;
    std::memcpy(&down, &bits, sizeof down);
    return down;
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

inline double slack(int64_t dim) { return static_cast<double>(dim + 16) * 0x1p-51; }

inline int64_t padded(int64_t codes) { return (codes + kCodes - 1) / kCodes * kCodes; }

// Whether a row of the table is this thread's: all its visits are, in their order.
inline bool mine(int64_t id) {
#ifdef _OPENMP
    return id % omp_get_num_threads() == omp_get_thread_num();
#else
    return id == id;
#endif
}

inline double* own_scratch(const RowBounds& bounds, double* scratch) {
#ifdef _OPENMP
    return scratch + omp_get_thread_num() * bounded_lookup_scratch(bounds);
#else
    return scratch;
#endif
}

struct Lookup {
    const RowBounds& bounds;
    const int64_t* ids;
    const float *x, *codebook, *packed;
    int64_t count, version;
    int64_t* indices;
    double relative;

    const float* row(int64_t h, int64_t n) const { return x + (h * count + n) * bounds.dim; }
    const float* code(int64_t h, int64_t k) const { return codebook + (h * bounds.codes + k) * bounds.dim; }
    RowRecord* record(int64_t h, int64_t n) const {
        const int64_t words = static_cast<int64_t>(sizeof(RowRecord) / 4) + bounds.dim + 2 * bounds.list;
        return reinterpret_cast<RowRecord*>(bounds.records + (ids[n] * bounds.heads + h) * words);
    }
    float* anchor(RowRecord* record) const { return reinterpret_cast<float*>(record + 1); }
    float* key(RowRecord* record) const { return anchor(record) + bounds.dim; }
    int32_t* listed(RowRecord* record) const { return reinterpret_cast<int32_t*>(key(record) + bounds.list); }
    // A code whose distance from the anchor, less its path, is above this is farther than `distance` from the row.
    double reach(double distance, double moved) const { return (distance + moved) * (1 + relative); }
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

// Leaves kSearch in place of the index if the row has to be searched in full. lower: room for the list.
void decide_by_bounds(const Lookup& lookup, int64_t h, int64_t n, double* __restrict lower, Work* work) {
    const RowBounds& bounds = lookup.bounds;
    RowRecord* record = lookup.record(h, n);
    int64_t& index = lookup.indices[h * lookup.count + n];
    index = kSearch;
    const int32_t since = record->version;
    if (since < 0) return;
    const int64_t D = bounds.dim, listed = record->listed;
    const float* row = lookup.row(h, n);
    const double square = squared_distance(row, lookup.anchor(record), D);
    int64_t cost = 1;
    ++work->distances;
    if (square - square != 0) {  // the anchor is finite, so the row is not
        index = kUndecided;
        return;
    }
    const double moved = __builtin_sqrt(square) * (1 + lookup.relative);
    const double* __restrict path = bounds.path + h * bounds.codes;
    const float* __restrict key = lookup.key(record);
    const int32_t* __restrict code = lookup.listed(record);
    const double rest = static_cast<double>(record->rest) - bounds.sweep[h];
    const int32_t* recent = bounds.recent + h * bounds.codes;
    const int32_t* jumped = bounds.jumped + h * bounds.codes;
    const int64_t recent_count = bounds.recent_count[h];
    const bool jumps = recent_count > 0 && jumped[recent[0]] > since;

    // lower bounds on the distances from the anchor
    for (int64_t j = 0; j < listed; ++j) lower[j] = static_cast<double>(key[j]) - path[code[j]];
    for (int64_t j = listed; j % kDoubles != 0; ++j) lower[j] = kInfinity;
    lower[0] = rest;
    vdouble lowest = load_doubles(lower);
    for (int64_t j = kDoubles; j < listed; j += kDoubles) {
        const vdouble value = load_doubles(lower + j);
        lowest = value < lowest ? value : lowest;
    }
    double least_other = lowest[0];
    for (int lane = 1; lane < kDoubles; ++lane) least_other = lowest[lane] < least_other ? lowest[lane] : least_other;

    const double upper = static_cast<double>(record->upper) + path[code[0]] + moved;
    if (!jumps && least_other > lookup.reach(upper, moved)) {
        index = code[0];
        ++work->proven;
    } else {
        const float affordable = record->spent / record->visits;
        Best best;
        best.index = code[0];
        best.square = squared_distance(row, lookup.code(h, code[0]), D);
        best.root = __builtin_sqrt(best.square) * (1 + lookup.relative);
        best.tied = false;
        int64_t compared = 1;
        double reach = lookup.reach(best.root, moved);
        for (int64_t j = 1; j < listed; ++j) {
            if (lower[j] > reach) continue;
            offer(lookup, h, &best, code[j], squared_distance(row, lookup.code(h, code[j]), D));
            reach = lookup.reach(best.root, moved);
            ++compared;
        }
        for (int64_t j = 0; j < recent_count && jumped[recent[j]] > since && compared < affordable; ++j) {
            offer(lookup, h, &best, recent[j], squared_distance(row, lookup.code(h, recent[j]), D));
            ++compared;
        }
        cost += compared;
        work->distances += compared;
        if (static_cast<float>(cost) > affordable || !(rest > lookup.reach(best.root, moved))) {
            ++work->failed;
            return;
        }
        index = best.tied ? kUndecided : best.index;
    }
    record->visits += 1;
    record->spent += static_cast<float>(cost);
}

// Rows of one head that wait to be searched in full.
struct Waiting {
    int count;
    int64_t n[kAtOnce];
    double* row;     // [dim, kAtOnce] the rows
    double* square;  // [kAtOnce, padded codes] their squared distances, infinite in the padding
};

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
    for (int r = 0; r < kAtOnce; ++r) {
        for (int64_t k = K; k < padded(K); ++k) waiting->square[r * padded(K) + k] = kInfinity;
    }
}

struct Range {
    double least, most;
};

inline Range range(const double* square, int64_t codes) {
    vdouble least = load_doubles(square), most = least;
    int64_t k = kDoubles;
    for (; k + kDoubles <= codes; k += kDoubles) {
        const vdouble value = load_doubles(square + k);
        least = value < least ? value : least;
        most = value > most ? value : most;
    }
    Range out = {square[0], square[0]};
    auto take = [&](double value) {
        out.least = value < out.least ? value : out.least;
        out.most = value > out.most ? value : out.most;
    };
    if (codes >= kDoubles) {
        for (int lane = 0; lane < kDoubles; ++lane) take(least[lane]), take(most[lane]);
        for (; k < codes; ++k) take(square[k]);
    } else {
        for (k = 0; k < codes; ++k) take(square[k]);
    }
    return out;
}

inline bool any_lane(vlong mask) {
    int64_t any = 0;
    for (int lane = 0; lane < kDoubles; ++lane) any |= mask[lane];
    return any != 0;
}

inline int64_t count_up_to(const double* square, int64_t padded_codes, double limit) {
    const vdouble limits = limit - vdouble{};
    vlong count = {};
    for (int64_t k = 0; k < padded_codes; k += kDoubles) count -= load_doubles(square + k) <= limits;
    int64_t sum = 0;
    for (int lane = 0; lane < kDoubles; ++lane) sum += count[lane];
    return sum;
}

// A limit that at most `list` and, unless many are equal, more than 3/4 as many squared distances do not exceed; below
// all of them if the least is too common.
double list_limit(const double* square, int64_t codes, int64_t list, Range all) {
    if (list >= codes) return all.most;
    double low = all.least, high = all.most;
    if (count_up_to(square, padded(codes), low) > list) return -1;
    for (int step = 0; step < 40; ++step) {
        const double middle = low + (high - low) / 2;
        if (!(middle > low && middle < high)) break;
        const int64_t count = count_up_to(square, padded(codes), middle);
        if (count > list) {
            high = middle;
        } else {
            low = middle;
            if (4 * count > 3 * list) break;
        }
    }
    return low;
}

// Search the waiting rows in full and start their bounds anew. lower: room for the list.
void search_in_full(const Lookup& lookup, int64_t h, Waiting* waiting, double* __restrict lower, Work* work) {
    const RowBounds& bounds = lookup.bounds;
    const int64_t K = bounds.codes, D = bounds.dim;
    const double wide = 1 + lookup.relative, narrow = 1 - lookup.relative;
    const double* __restrict path = bounds.path + h * K;
    if (waiting->count == 0) return;
    all_distances(lookup, h, waiting);
    work->distances += waiting->count * K;
    work->searched += waiting->count;
    for (int r = 0; r < waiting->count; ++r) {
        const int64_t n = waiting->n[r];
        const double* square = waiting->square + r * padded(K);
        int64_t& out = lookup.indices[h * lookup.count + n];
        out = kUndecided;
        if (square[0] - square[0] != 0) continue;  // the codes are finite, so the row is not
        const Range all = range(square, K);
        const double limit = list_limit(square, K, bounds.list, all), near = all.least * wide;

        RowRecord* record = lookup.record(h, n);
        float* __restrict key = lookup.key(record);
        int32_t* __restrict code = lookup.listed(record);
        int64_t index = 0, listed = 0;
        bool tied = false;
        double beyond = kInfinity;  // the least that is not in the list
        auto list = [&](int64_t k) {
            lower[listed] = square[k];
            code[listed++] = static_cast<int32_t>(k);
        };
        vdouble others = kInfinity - vdouble{};
        for (int64_t first = 0; first < K; first += kDoubles) {
            const vdouble value = load_doubles(square + first);
            const vlong inside = value <= limit - vdouble{};
            const vdouble outside = inside ? kInfinity - vdouble{} : value;
            others = outside < others ? outside : others;
            if (!any_lane(inside)) continue;
            for (int64_t k = first; k < first + kDoubles && k < K; ++k) {
                if (square[k] <= limit) list(k);
            }
        }
        for (int lane = 0; lane < kDoubles; ++lane) beyond = others[lane] < beyond ? others[lane] : beyond;
        // of equal codes, which have equal distances, the first is right
        if (listed > 0) {
            int64_t j = 0;
            while (lower[j] != all.least) ++j;
            index = code[j];
        } else {
            while (square[index] != all.least) ++index;
        }
        if (listed == 0) list(index);
        for (int64_t j = 0; j < listed; ++j) lower[j] = (__builtin_sqrt(lower[j]) * narrow + path[code[j]]) * narrow;
        for (int64_t j = 0; j < listed; ++j) key[j] = round_down(lower[j]);
        if (count_up_to(square, padded(K), near) > 1) {
            for (int64_t k = 0; k < K && !tied; ++k) {
                tied = square[k] <= near && !equal_codes(lookup.code(h, k), lookup.code(h, index), D);
            }
        }
        if (!tied) out = index;
        for (int64_t j = 0; j < listed; ++j) {
            if (code[j] != index) continue;
            const float its_key = key[j];
            code[j] = code[0], key[j] = key[0];
            code[0] = static_cast<int32_t>(index), key[0] = its_key;
        }
        std::memcpy(lookup.anchor(record), lookup.row(h, n), D * sizeof(float));
        const double upper = __builtin_sqrt(all.least) * wide - path[index];
        record->upper = round_up(upper + (upper < 0 ? -upper : upper) * lookup.relative);
        record->rest =
            listed == K ? __builtin_inff() : round_down((__builtin_sqrt(beyond) * narrow + bounds.sweep[h]) * narrow);
        record->version = static_cast<int32_t>(lookup.version);
        record->listed = static_cast<int32_t>(listed);
        record->visits = 1;
        record->spent = static_cast<float>(K);
    }
    waiting->count = 0;
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

int64_t packed_codes(int64_t codes) { return padded(codes); }

int64_t bounded_lookup_scratch(const RowBounds& bounds) {
    return kAtOnce * (padded(bounds.codes) + bounds.dim) + padded(bounds.list);
}

int64_t lookup_by_bounds(const RowBounds& bounds, const int64_t* ids, const float* x, const float* codebook,
                         int64_t count, int64_t version, int threads, double* scratch, int64_t* indices, Work* work) {
    const Lookup lookup = {bounds, ids, x, codebook, nullptr, count, version, indices, slack(bounds.dim)};
    int64_t distances = 0, proven = 0, failed = 0, open = 0;
#pragma omp parallel num_threads(threads) reduction(+ : distances, proven, failed, open)
    {
        double* lower = own_scratch(bounds, scratch);
        Work own = {0, 0, 0, 0};
        for (int64_t n = 0; n < count; ++n) {
            if (!mine(ids[n])) continue;
            for (int64_t h = 0; h < bounds.heads; ++h) {
                decide_by_bounds(lookup, h, n, lower, &own);
                open += indices[h * count + n] == kSearch;
            }
        }
        distances += own.distances;
        proven += own.proven;
        failed += own.failed;
    }
    work->distances += distances;
    work->proven += proven;
    work->failed += failed;
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
        double* lower = own_scratch(bounds, scratch);
        double* row = lower + padded(bounds.list);
        Work own = {0, 0, 0, 0};
        Waiting waiting = {0, {}, row, row + kAtOnce * D};
        for (int64_t h = 0; h < bounds.heads; ++h) {
            for (int64_t n = 0; n < count; ++n) {
                if (indices[h * count + n] != kSearch || !mine(ids[n])) continue;
                // a row that comes again is known once it has been searched
                for (int w = 0; w < waiting.count; ++w) {
                    if (ids[waiting.n[w]] == ids[n]) search_in_full(lookup, h, &waiting, lower, &own);
                }
                if (lookup.record(h, n)->version == version) decide_by_bounds(lookup, h, n, lower, &own);
                if (indices[h * count + n] != kSearch) continue;
                waiting.n[waiting.count++] = n;
                if (waiting.count == kAtOnce) search_in_full(lookup, h, &waiting, lower, &own);
            }
            search_in_full(lookup, h, &waiting, lower, &own);
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
