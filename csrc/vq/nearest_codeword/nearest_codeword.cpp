// Nearest codeword: approximate scores with a proven error for all codes, then true distances for the few codes that
// these cannot exclude. packing.cpp prepares the codes, scan.h computes the scores, cluster_search.h treats
// near-duplicate codes, decision.h compares the rest.
//
// With m the mean code, X = x - m and C = c - m, the code of least ||x - c||^2 has the largest score
// s = X.C - ||C||^2 / 2. The scan computes scores S from approximations x' of X and c' of C, float32 or integers of 8
// or 16 bits times a scale, and keeps for each row the largest score of every group of codes. With R >= ||X||, ||x'||,
// r >= ||X - x'||, and for the codes of a panel Q >= ||C||, ||c'||, q >= ||C - c'||, and u = 2^-24,
//     |S - s| <= E = r Q + R q + k u (R Q + Q^2 / 2) + f (R + Q)^2 + underflow.
// k: float32 arithmetic. A sum of dim products, fused or not, rounds partial sums of magnitude at most R Q + Q^2 / 2
//   dim times, and ||C||^2 / 2 is such a sum: k = 2 dim + 16 covers both, the roundings of X and C, and a product
//   alone. Integer sums are exact; their conversion, scale and the sum with -||C||^2 / 2 leave k = dim + 16.
// f = (dim + 4) 2^-53: the float64 sum that defines the index differs from the real distance by up to 2 f (R + Q)^2.
// A slot that represents a near-duplicate cluster of radius p adds R p + Q p: a member's score can exceed that of the
// slot by so much.
// With L the largest S - E of all, a group whose largest S + E is below L cannot contain the nearest code. Members of a
// cluster are compared the same way by the scores X.e - g of their differences e from the first member, g =
// (first - m).e + ||e||^2 / 2, whose error is k u (R p + Q p + p^2 / 2) + f (R + Q)^2.
// For the codes left, d = sum (x - c)^2 in float32 is within (dim + 8) u d of the distance, which mostly proves the
// nearest. If not, the codes that can still be nearest are compared by the definition itself, in float64 (exact.cpp).
//
// With the product metric the code of largest x.c = X.C + m.C (+ x.m, the same for all) is sought, and codes may have
// any length. -||C||^2 / 2 becomes m.C, summed in float64 and rounded once, so that with M >= ||m||
//     |S - s| <= E = r Q + R q + k u (R Q + M Q) + f (R + M) (Q + M) + underflow,
// where f covers the sum in float64 that defines the product. A cluster adds R p + M p, and its members are compared
// with g = -m.e. For the codes left, x.c in float32 is within (dim + 8) u ||x|| ||c|| of the product; the cost of a
// code is minus its product.
#include "vq/nearest_codeword/nearest_codeword.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include "vq/nearest_codeword/cluster_search.h"

namespace metarec::METAREC_ISA {
namespace {

constexpr int64_t kFew = 32, kWaiting = 8;  // candidates of a row, rows that are decided together

// Rows begin..end of those to search in head h.
struct Block {
    const Search& search;
    int64_t h, begin, end;

    int64_t size() const { return end - begin; }
    int64_t row(int64_t i) const {  // the row of x that is the i-th of the block
        const SearchRows& rows = search.rows;
        return rows.listed == nullptr ? begin + i : rows.listed[h * rows.rows + begin + i];
    }
    const float* x(int64_t row) const { return search.rows.x + (h * search.rows.rows + row) * search.codebook.dim; }
};

template <int kBits>
inline void pack_rows(const Block& block, const Workspace& w) {
    for (int64_t first = 0; first < block.size(); first += kRows) {
        const float* x[kRows];
        for (int r = 0; r < kRows; ++r) x[r] = block.x(block.row(first + r < block.size() ? first + r : first));
        pack_tile<kBits>(block.search, block.h, x, first, w);
    }
}

// The largest score of every group of codes, for every row.
template <int kBits>
inline void scan_codes(const Block& block, const Workspace& w) {
    const Codebook& codebook = block.search.codebook;
    const int64_t group = codebook.group, stride = codebook.panels * kFloats;
    const int64_t panels = used_panels(codebook, block.h), tiles = (block.size() + kRows - 1) / kRows;
    for (int64_t p = 0; p < panels; ++p) {
        const int64_t panel = block.h * codebook.panels + p, vector = panel * group * kFloats;
        for (int64_t t = 0; t < tiles; ++t) {
            scan<kBits>(w.words + t * kRows * codebook.words, w.factor + t * kRows, w.offset + t * kRows,
                        codebook.scan.words + vector * codebook.words, codebook.scan.start + vector,
                        codebook.scan.scale[panel], codebook.words, group, w.maxima + t * kRows * stride + p * kFloats,
                        stride);
        }
    }
}

// The errors of these scores, and the threshold below which a group cannot contain the nearest code.
inline void bound_scores(const Block& block, const Workspace& w) {
    const Search& search = block.search;
    const Codebook& codebook = search.codebook;
    const int64_t panels = used_panels(codebook, block.h), errors = padded_panels(codebook);
    const int64_t stride = codebook.panels * kFloats, at = block.h * errors;
    const float definition = search.products ? 0 : static_cast<float>(codebook.dim + 4) * 0x1p-53f;
    for (int64_t i = 0; i < block.size(); ++i) {
        const float r = w.rounding[i], R = w.norm[i] + r;
        for (int64_t p = 0; p < panels; p += kFloats) {
            store(w.error + i * errors + p, load(codebook.by_rounding + at + p) * r +
                                                load(codebook.by_norm + at + p) * R + load(codebook.constant + at + p) +
                                                definition * R * R);
        }
        w.threshold[i] =
            least_score(w.maxima + i * stride, w.error + i * errors, panels, wants_margin(search.out, block.row(i)));
    }
}

inline bool finite(const float* x, int64_t dim) {
    bool all = true;
    for (int64_t d = 0; d < dim; ++d) all &= x[d] - x[d] == 0;
    return all;
}

inline void defer(const Unresolved& unresolved, int64_t h, int64_t rows, int64_t row) {
    int64_t at;
#pragma omp atomic capture
    at = unresolved.count[h]++;
    unresolved.rows[h * rows + at] = row;
}

// Decides the rows between the codes of the groups that reach their thresholds. Returns how many it left unresolved.
template <int kBits>
inline int64_t decide_rows(const Block& block, const Workspace& w) {
    const Search& search = block.search;
    const Codebook& codebook = search.codebook;
    const int64_t h = block.h, dim = codebook.dim, stride = codebook.panels * kFloats;
    const int64_t panels = used_panels(codebook, h), errors = padded_panels(codebook);
    for (int64_t j = 0; j < codebook.clusters.most; ++j) w.cluster_tile[j] = -1;
    int64_t left = 0;
    auto resolve = [&](int64_t row, int32_t* candidates, float* cost, int64_t count, const CostError& cost_error) {
        if (count >= 0 && decide(search, h, row, candidates, cost, count, cost_error)) return;
        defer(*search.unresolved, h, search.rows.rows, row);
        ++left;
    };
    // rows with few candidates wait for each other, so that the latency of one decision hides behind the next
    struct {
        int64_t row, count;
        CostError cost_error;
        int32_t candidates[kFew + kMaxGroup];
        float cost[kFew + 4 + kFloats];
    } waiting[kWaiting];
    int64_t waits = 0;
    auto flush = [&] {
        for (int64_t j = 0; j < waits; ++j) {
            resolve(waiting[j].row, waiting[j].candidates, waiting[j].cost, waiting[j].count, waiting[j].cost_error);
        }
        waits = 0;
    };
    for (int64_t i = 0; i < block.size(); ++i) {
        const int64_t row = block.row(i);
        if (!(w.norm[i] < kInfinity) && !finite(block.x(row), dim)) {
            emit(search, h, row, 0, codebook.codes == 1 ? kInfinity : 0, __builtin_nanf(""));
            continue;
        }
        const float* maxima = w.maxima + i * stride;
        const float* error = w.error + i * errors;
        if (codebook.clusters.most == 0) {
            auto& few = waiting[waits];
            few.row = row;
            few.count = collect(search, h, w.threshold[i], maxima, error, panels, kFew, few.candidates);
            if (few.count >= 0) {
                few.cost_error = measure_candidates(search, h, row, w.norm[i], few.candidates, few.cost, few.count);
                if (++waits == kWaiting) flush();
                continue;
            }
        }
        int64_t count = collect(search, h, w.threshold[i], maxima, error, panels, search.limit, w.candidates);
        if (kBits == 32 && codebook.clusters.most > 0) count = expand_clusters(search, h, row, i, w, count);
        CostError cost_error = {};
        if (count >= 0) cost_error = measure_candidates(search, h, row, w.norm[i], w.candidates, w.cost, count);
        resolve(row, w.candidates, w.cost, count, cost_error);
    }
    flush();
    return left;
}

// Searches the rows of a block. Returns how many it left unresolved.
template <int kBits>
int64_t search_block(const Block& block, const Workspace& w) {
    pack_rows<kBits>(block, w);
    scan_codes<kBits>(block, w);
    bound_scores(block, w);
    return decide_rows<kBits>(block, w);
}

}  // namespace

int64_t search_scratch(const Codebook& codebook) { return carve(nullptr, codebook).size + 64; }

void nearest_codeword_f32(const Codebook& codebook, const SearchRows& rows, int threads, void* scratch,
                          const SearchOutput& out, const Unresolved* unresolved) {
    // beyond the limit, distances would cost more than half a search in float32
    const int64_t eighth = codebook.codes / 8, limit = unresolved == nullptr ? INT64_MAX : eighth > 32 ? eighth : 32;
    const Search search = {codebook, rows, out, unresolved, codebook.metric == Metric::product, limit};
    const int64_t block = block_rows(codebook.words), blocks = (rows.rows + block - 1) / block;
    const int64_t bytes = search_scratch(codebook);
    int64_t tried = 0, left = 0;
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        char* mine = static_cast<char*>(scratch) + omp_get_thread_num() * bytes;
#else
        char* mine = static_cast<char*>(scratch);
#endif
        mine = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(mine) + 63) / 64 * 64);
        const Workspace w = carve(mine, codebook);
#pragma omp for schedule(dynamic) nowait
        for (int64_t task = 0; task < codebook.heads * blocks; ++task) {
            const int64_t h = task / blocks, begin = task % blocks * block;
            const int64_t count = rows.listed == nullptr ? rows.rows : rows.count[h];
            const int64_t end = begin + block < count ? begin + block : count;
            if (begin >= end) continue;
            const Block rows_of = {search, h, begin, end};
            if (unresolved == nullptr) {
                search_block<32>(rows_of, w);
                continue;
            }
            if constexpr (kScreens) {
                int64_t so_far, given_up;
#pragma omp atomic read
                so_far = tried;
#pragma omp atomic read
                given_up = left;
                if (so_far >= 4 * block && 4 * given_up > so_far) {  // integers do not resolve these codes
                    for (int64_t i = begin; i < end; ++i) defer(*unresolved, h, rows.rows, i);
                    recheck(out, end - begin);
                    continue;
                }
                const int64_t more = codebook.bits == 8 ? search_block<8>(rows_of, w) : search_block<16>(rows_of, w);
                recheck(out, more);
#pragma omp atomic
                left += more;
#pragma omp atomic
                tried += end - begin;
            }
        }
    }
}

}  // namespace metarec::METAREC_ISA
