// Nearest codeword in float32 with a proof per row, and float64 where the proof fails.
//
// With m the mean code, X = x - m and C = c - m, the code of least ||x - c||^2 has the largest score
// s = X.C - ||C||^2 / 2. The loop computes a score S from x' = fl(X), c' = fl(C) and h = fl(||C||^2 / 2), starting from
// -h and adding dim products. With u = 2^-24, each addition (fused or not) rounds a partial sum of magnitude at most
// h + ||x'|| ||c'||, each product alone errs by u of itself, rounding X and C costs 2u ||X|| ||C||, rounding h costs
// u h; second-order terms are below the slack of the constant:
//     |S - s| <= E = (dim + 6) u (1 + 4 dim u) (||x'|| ||c'|| + h) + underflow,
// and E is infinite where a partial sum might overflow.
// If the largest score leads the second by more than 2 max E, it is the nearest code. Otherwise the codes that can
// still win, S + E >= S_best - E_best, are compared in float64 by the definition itself (exact.cpp).
#include "vq/nearest_codeword.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include "core/vec.h"
#include "vq/exact.h"

namespace metarec::METAREC_ISA {
namespace {

// A tile of kRows x kVectors accumulators; the registers left hold kVectors of codes and a broadcast element of a row.
#if defined(METAREC_ISA_avx512)
constexpr int kRows = 12, kVectors = 2;
#elif defined(METAREC_ISA_avx2)
constexpr int kRows = 6, kVectors = 2;
#else
constexpr int kRows = 4, kVectors = 2;
#endif
constexpr int kWidth = kVectors * kFloats;
constexpr float kInfinity = __builtin_inff();
constexpr int kCandidates = 8;  // offered together

// Rows of a block: packed rows and running maxima stay in L1 while one panel after the other passes over them;
// longer rows stay in L2, and more of them share each panel.
inline int64_t block_rows(int64_t dim) { return dim <= 32 || dim > 128 ? 96 : 48; }

// Running maxima of a row, a lane per residue of the slot.
struct Lead {
    vfloat best, second;
    vint vector;  // which vector of slots holds best
};

struct Row {
    int64_t row, slot;
    float norm, best, second;
};

struct Search {
    const Codebook& codebook;
    const float* x;
    int64_t rows;
    const SearchOutput& out;
};

inline int64_t used_panels(const Codebook& codebook, int64_t h) { return (codebook.slots[h] + kWidth - 1) / kWidth; }

inline bool any_lane(vint mask) {
    int64_t words[sizeof(vint) / 8], any = 0;
    std::memcpy(words, &mask, sizeof words);
    for (int64_t word : words) any |= word;
    return any != 0;
}

// [dim, kRows] rows minus the mean. norm: at least ||row - mean||, infinite if a score might overflow.
inline void pack(const float* const* row, const float* mean, int64_t dim, float* packed, float* norm) {
    float square[kRows] = {};
    for (int64_t d = 0; d < dim; ++d) {
        for (int r = 0; r < kRows; ++r) {
            const float value = row[r][d] - mean[d];
            packed[d * kRows + r] = value;
            square[r] += value * value;
        }
    }
    // slack for the rounding of the sum, and for squares that underflow
    const float relative = 1 + static_cast<float>(dim + 8) * 0x1p-23f;
    const float absolute = __builtin_sqrtf(static_cast<float>(dim)) * 0x1p-62f;
    for (int r = 0; r < kRows; ++r) {
        norm[r] = square[r] > kMaxSquare ? kInfinity : __builtin_sqrtf(square[r]) * relative + absolute;
    }
}

[[gnu::always_inline]] inline void scores(const float* __restrict x, const float* __restrict panel,
                                          const float* __restrict start, int64_t dim,
                                          vfloat (&score)[kRows][kVectors]) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) score[r][v] = load(start + v * kFloats);
    }
    for (int64_t d = 0; d < dim; ++d, x += kRows, panel += kWidth) {
        vfloat code[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) code[v] = load(panel + v * kFloats);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
            const vfloat value = broadcast(x[r]);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) score[r][v] += value * code[v];
        }
    }
}

inline void update(Lead* lead, const float* x, const float* panel, const float* start, int64_t dim, int32_t vector) {
    vfloat score[kRows][kVectors];
    scores(x, panel, start, dim, score);
    // opaque from here on: broadcast before the loop over dim, it would hold registers that the tile needs
    asm volatile("" : "+r"(vector));
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
        vfloat best = lead[r].best, second = lead[r].second;
        vint at = lead[r].vector;
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            const vint higher = score[r][v] > best;
            const vfloat loser = higher ? best : score[r][v];
            best = higher ? score[r][v] : best;
            at = higher ? vint{} + (vector + v) : at;
            second = second > loser ? second : loser;
        }
        lead[r].best = best;
        lead[r].second = second;
        lead[r].vector = at;
    }
}

// The best slot over all lanes, the lowest of equals.
inline Row reduce(const Lead& lead, int64_t row, float norm) {
    float best = -kInfinity, second = -kInfinity;
    int64_t slot = 0;
    for (int lane = 0; lane < kFloats; ++lane) {
        const float value = lead.best[lane];
        const int64_t at = static_cast<int64_t>(lead.vector[lane]) * kFloats + lane;
        const float loser = value > best ? best : value;
        second = second > loser ? second : loser;
        second = second > lead.second[lane] ? second : lead.second[lane];
        slot = value > best || (value == best && at < slot) ? at : slot;
        best = value > best ? value : best;
    }
    return {row, slot, norm, best, second};
}

inline void emit(const Search& search, int64_t h, int64_t row, int64_t index, float margin) {
    const int64_t at = h * search.rows + row, dim = search.codebook.dim;
    search.out.indices[at] = index;
    if (search.out.margin != nullptr) {
        search.out.margin[at] = search.codebook.duplicated[h * search.codebook.codes + index] ? 0 : margin;
    }
    if (search.out.quantized == nullptr) return;
    const float* __restrict x = search.x + at * dim;
    const float* __restrict code = search.codebook.original + (h * search.codebook.codes + index) * dim;
    float* __restrict quantized = search.out.quantized + at * dim;
    vfloat sum = {};
    int64_t d = 0;
    for (; d + kFloats <= dim; d += kFloats) {
        const vfloat value = load(code + d), error = load(x + d) - value;
        store(quantized + d, value);
        sum += error * error;
    }
    float total = 0;
    for (int lane = 0; lane < kFloats; ++lane) total += sum[lane];
    for (; d < dim; ++d) {
        quantized[d] = code[d];
        total += (x[d] - code[d]) * (x[d] - code[d]);
    }
    search.out.row_error[at] = total;
}

// Up to kRows rows of one head whose float32 lead proves nothing: compare in float64 every code that can still win.
void decide_exactly(const Search& search, int64_t h, const Row* undecided, int count, float* packed) {
    const Codebook& codebook = search.codebook;
    const int64_t dim = codebook.dim, slots = h * codebook.panels * kWidth;
    const float* original = codebook.original + h * codebook.codes * dim;
    const float* row[kRows];
    float norm[kRows], least_score[kRows];
    Nearest nearest[kRows];
    int32_t candidates[kRows][kCandidates];
    int waiting[kRows] = {};
    for (int r = 0; r < kRows; ++r) {
        const Row& of = undecided[r < count ? r : 0];
        row[r] = search.x + (h * search.rows + of.row) * dim;
        const int64_t s = slots + of.slot;
        least_score[r] = of.best - (codebook.error_slope[s] * of.norm + codebook.error_base[s]);
        nearest[r] = {__builtin_inf(), __builtin_inf(), -1};
    }
    pack(row, codebook.mean + h * dim, dim, packed, norm);
    for (int64_t p = 0; p < used_panels(codebook, h); ++p) {
        const int64_t first = slots + p * kWidth;
        vfloat score[kRows][kVectors];
        scores(packed, codebook.packed + (h * codebook.panels + p) * dim * kWidth, codebook.start + first, dim, score);
        for (int r = 0; r < count; ++r) {
            vint possible[kVectors];
            vint any = {};
            for (int v = 0; v < kVectors; ++v) {
                const int64_t s = first + v * kFloats;
                const vfloat error =
                    load(codebook.error_slope + s) * broadcast(norm[r]) + load(codebook.error_base + s);
                possible[v] = ~(score[r][v] + error < broadcast(least_score[r]));  // NaN, from an overflow, is possible
                any |= possible[v];
            }
            if (!any_lane(any)) continue;
            for (int64_t w = 0; w < kWidth && p * kWidth + w < codebook.slots[h]; ++w) {
                if (possible[w / kFloats][w % kFloats] == 0) continue;
                candidates[r][waiting[r]++] = codebook.code[first + w];
                if (waiting[r] < kCandidates) continue;
                offer_exact_f32(&nearest[r], row[r], original, candidates[r], kCandidates, dim);
                waiting[r] = 0;
            }
        }
    }
    for (int r = 0; r < count; ++r) {
        offer_exact_f32(&nearest[r], row[r], original, candidates[r], waiting[r], dim);
        if (nearest[r].index < 0) {  // every distance is infinite
            emit(search, h, undecided[r].row, 0, codebook.codes == 1 ? kInfinity : 0);
            continue;
        }
        const double gap = nearest[r].second - nearest[r].least;
        // a code that wins alone among several has finite scores
        const bool scored = nearest[r].second == __builtin_inf() && codebook.slots[h] > 1;
        emit(search, h, undecided[r].row, nearest[r].index,
             scored ? 2 * (undecided[r].best - undecided[r].second) : static_cast<float>(gap));
    }
}

// The rows of one head that a thread still has to decide.
struct Undecided {
    int64_t head;
    int count;
    Row rows[kRows];
};

inline void flush(const Search& search, Undecided* undecided, float* packed) {
    if (undecided->count > 0) decide_exactly(search, undecided->head, undecided->rows, undecided->count, packed);
    undecided->count = 0;
}

void search_block(const Search& search, int64_t h, int64_t begin, int64_t end, Undecided* undecided, float* scratch) {
    const Codebook& codebook = search.codebook;
    const int64_t dim = codebook.dim, block = block_rows(dim);
    float* spare = scratch;  // one packed tile, for rows that are decided exactly
    float* packed = spare + kRows * dim;
    float* norm = packed + block * dim;
    Lead* lead = reinterpret_cast<Lead*>((reinterpret_cast<uintptr_t>(norm + block) + 63) / 64 * 64);

    for (int64_t first = begin; first < end; first += kRows) {
        const float* row[kRows];
        for (int r = 0; r < kRows; ++r) {
            row[r] = search.x + (h * search.rows + (first + r < end ? first + r : first)) * dim;
        }
        pack(row, codebook.mean + h * dim, dim, packed + (first - begin) * dim, norm + (first - begin));
    }
    const int64_t tiles = (end - begin + kRows - 1) / kRows;
    for (int64_t r = 0; r < tiles * kRows; ++r) lead[r] = {broadcast(-kInfinity), broadcast(-kInfinity), vint{}};
    for (int64_t p = 0; p < used_panels(codebook, h); ++p) {
        const float* panel = codebook.packed + (h * codebook.panels + p) * dim * kWidth;
        const float* start = codebook.start + (h * codebook.panels + p) * kWidth;
        for (int64_t t = 0; t < tiles; ++t) {
            update(lead + t * kRows, packed + t * kRows * dim, panel, start, dim, static_cast<int32_t>(p * kVectors));
        }
    }
    if (undecided->head != h) flush(search, undecided, spare);
    undecided->head = h;
    for (int64_t r = 0; r < end - begin; ++r) {
        const Row row = reduce(lead[r], begin + r, norm[r]);
        const float error = codebook.max_error_slope[h] * row.norm + codebook.max_error_base[h];
        if (row.best - row.second > 2 * error) {
            const int64_t index = codebook.code[h * codebook.panels * kWidth + row.slot];
            emit(search, h, row.row, index, 2 * (row.best - row.second));
            continue;
        }
        undecided->rows[undecided->count++] = row;
        if (undecided->count == kRows) flush(search, undecided, spare);
    }
}

}  // namespace

int64_t codebook_width() { return kWidth; }

int64_t search_scratch(int64_t dim) {
    const int64_t lead = static_cast<int64_t>(sizeof(Lead) / sizeof(float));
    return (block_rows(dim) + kRows) * (dim + 1 + lead) + 32;
}

void nearest_codeword_f32(const Codebook& codebook, const float* x, int64_t rows, int threads, float* scratch,
                          const SearchOutput& out) {
    const Search search = {codebook, x, rows, out};
    const int64_t block = block_rows(codebook.dim), blocks = (rows + block - 1) / block;
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        float* mine = scratch + omp_get_thread_num() * search_scratch(codebook.dim);
#else
        float* mine = scratch;
#endif
        Undecided undecided = {0, 0, {}};
#pragma omp for schedule(dynamic) nowait
        for (int64_t task = 0; task < codebook.heads * blocks; ++task) {
            const int64_t begin = task % blocks * block;
            search_block(search, task / blocks, begin, begin + block < rows ? begin + block : rows, &undecided, mine);
        }
        flush(search, &undecided, mine);
    }
}

}  // namespace metarec::METAREC_ISA
