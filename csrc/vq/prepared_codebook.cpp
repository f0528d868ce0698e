#include "vq/prepared_codebook.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#include "vq/nearest_codeword.h"

namespace metarec {
namespace {

constexpr std::align_val_t kAlignment{64};

constexpr int kLanes = 4;  // independent chains, to hide the latency of each

// Equal codes hash equally (adding zero turns -0 into 0); 0 for a code with a NaN or an infinity.
uint64_t hash(const float* code, int64_t dim) {
    uint64_t lane[kLanes] = {1, 2, 3, 4};
    uint32_t infinite = 0;
    auto mix = [&](int64_t d, int j) {
        const float value = code[d] + 0.0f;
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        infinite |= (bits & 0x7F800000u) == 0x7F800000u;
        lane[j] = (lane[j] ^ bits) * 0x9E3779B97F4A7C15u;
        lane[j] ^= lane[j] >> 29;
    };
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) {
        for (int j = 0; j < kLanes; ++j) mix(d + j, j);
    }
    for (; d < dim; ++d) mix(d, 0);
    const uint64_t sum =
        ((lane[0] * 3 + lane[1]) * 0xBF58476D1CE4E5B9u) ^ ((lane[2] * 5 + lane[3]) * 0x94D049BB133111EBu);
    return infinite ? 0 : sum | 1;
}

// Distinct finite codes, each at its lowest index. Returns how many.
int64_t distinct_codes(const float* codes, const uint64_t* hashes, int64_t count, int64_t dim, int32_t* kept,
                       uint8_t* duplicated) {
    size_t capacity = 16;
    while (capacity < 2 * static_cast<size_t>(count)) capacity *= 2;
    std::vector<int32_t> table(capacity, -1);
    int64_t slots = 0;
    std::fill_n(duplicated, count, 0);
    for (int64_t k = 0; k < count; ++k) {
        const float* code = codes + k * dim;
        if (hashes[k] == 0) continue;
        size_t at = (hashes[k] >> 1) & (capacity - 1);
        auto differs = [&](int32_t other) {
            return hashes[other] != hashes[k] || !std::equal(code, code + dim, codes + other * dim);
        };
        while (table[at] >= 0 && differs(kept[table[at]])) at = (at + 1) & (capacity - 1);
        if (table[at] >= 0) {
            duplicated[kept[table[at]]] = 1;
            continue;
        }
        table[at] = static_cast<int32_t>(slots);
        kept[slots++] = static_cast<int32_t>(k);
    }
    return slots;
}

// Any centre gives exact codes; the mean of some gives small errors, and costs little.
constexpr int64_t kMeanOf = 512;

void mean_code(const float* codes, const int32_t* kept, int64_t slots, int64_t dim, float* mean) {
    std::vector<double> sum(dim, 0.0);
    const int64_t step = (slots + kMeanOf - 1) / kMeanOf;
    int64_t count = 0;
    for (int64_t s = 0; s < slots; s += step, ++count) {
        const float* code = codes + kept[s] * dim;
        for (int64_t d = 0; d < dim; ++d) sum[d] += code[d];
    }
    for (int64_t d = 0; d < dim; ++d) mean[d] = count > 0 ? static_cast<float>(sum[d] / static_cast<double>(count)) : 0;
}

// Codes of a group: small groups leave few distances to compute, large ones few maxima to compare. A panel of a few
// codes is mostly padding.
int64_t group_size(int64_t codes, int64_t dim, int64_t lanes) {
    if (codes <= 2 * lanes) return 2;
    return codes <= 512 || (dim > 16 && codes <= 4096) ? 4 : kMaxGroup;
}

// Lays arrays out one after the other, each on its own cache lines; with no base it only measures.
struct Arena {
    char* base;
    size_t used = 0;
    template <typename T>
    T* take(int64_t count) {
        T* at = reinterpret_cast<T*>(base + used);
        used += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
        return base == nullptr ? nullptr : at;
    }
};

// Calls `take` twice: to measure, and to hand out the memory.
template <typename Take>
void lay_out(AlignedMemory* memory, Take take) {
    Arena measure{nullptr};
    take(measure);
    *memory = allocate_aligned(measure.used);
    Arena arena{static_cast<char*>(memory->get())};
    take(arena);
}

void take_panels(Arena& arena, int64_t panels, int64_t group, int64_t lanes, int64_t words, Panels* out) {
    out->words = arena.take<uint32_t>(panels * group * words * lanes);
    out->start = arena.take<float>(panels * group * lanes);
    out->scale = arena.take<float>(panels);
}

constexpr double kLeastNorm = 1e-30;

// A hash of the grid cell of code - mean.
uint64_t cell(const float* code, const float* mean, int64_t dim, float inverse) {
    uint64_t lane[kLanes] = {1, 2, 3, 4};
    for (int64_t d = 0; d < dim; ++d) {
        const float shifted = (code[d] - mean[d]) * inverse + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
        uint32_t bits;
        std::memcpy(&bits, &shifted, sizeof bits);
        uint64_t& sum = lane[d % kLanes];
        sum = (sum ^ bits) * 0x9E3779B97F4A7C15u;
        sum ^= sum >> 29;
    }
    return ((lane[0] * 3 + lane[1]) * 0xBF58476D1CE4E5B9u) ^ ((lane[2] * 5 + lane[3]) * 0x94D049BB133111EBu);
}

double distance(const float* a, const float* b, int64_t dim) {
    double sum = 0;
    for (int64_t d = 0; d < dim; ++d) sum += (static_cast<double>(a[d]) - b[d]) * (static_cast<double>(a[d]) - b[d]);
    return std::sqrt(sum);
}

}  // namespace

void FreeAligned::operator()(void* memory) const { ::operator delete(memory, kAlignment); }

AlignedMemory allocate_aligned(size_t bytes) { return AlignedMemory(::operator new(bytes, kAlignment)); }

PreparedCodebook::PreparedCodebook(const float* codebook, int64_t heads, int64_t codes, int64_t dim, int bits,
                                   Metric metric) {
    Codebook& v = view_;
    v = {};
    v.metric = metric;
    v.heads = heads;
    v.codes = codes;
    v.dim = dim;
    v.bits = bits;
    v.lanes = METAREC_DISPATCH(codebook_lanes)();
    v.group = group_size(codes, dim, v.lanes);
    v.words = (dim * bits + 31) / 32;
    v.original = codebook;
    const int64_t width = v.lanes * v.group;
    v.panels = (codes + width - 1) / width;
    const int64_t padded = v.panels * width, vectors = (v.panels + v.lanes - 1) / v.lanes * v.lanes;
    lay_out(&memory_, [&](Arena& arena) {
        v.mean = arena.take<float>(heads * dim);
        v.code = arena.take<int32_t>(heads * padded + kMaxGroup);
        v.duplicated = arena.take<uint8_t>(heads * codes);
        v.slots = arena.take<int64_t>(heads);
        v.reach = arena.take<float>(heads);
        v.by_rounding = arena.take<float>(heads * vectors);
        v.by_norm = arena.take<float>(heads * vectors);
        v.constant = arena.take<float>(heads * vectors);
        if (metric == Metric::product) {
            v.length = arena.take<float>(heads * codes);
            v.one_length = arena.take<float>(heads);
            v.mean_length = arena.take<float>(heads);
        }
        v.clumps.of_code = bits < 32 ? nullptr : arena.take<int32_t>(heads * codes);
    });

    const bool large = heads * codes * dim > 1 << 15;
    std::vector<uint64_t> hashes(heads * codes);
#pragma omp parallel for schedule(static) if (large)
    for (int64_t k = 0; k < heads * codes; ++k) hashes[k] = hash(codebook + k * dim, dim);
#pragma omp parallel for schedule(dynamic) if (heads > 1 && large)
    for (int64_t h = 0; h < heads; ++h) {
        int32_t* code = v.code + h * padded;
        v.slots[h] = distinct_codes(codebook + h * codes * dim, hashes.data() + h * codes, codes, dim, code,
                                    v.duplicated + h * codes);
        mean_code(codebook + h * codes * dim, code, v.slots[h], dim, v.mean + h * dim);
    }
    std::vector<float> squares(heads * codes, 0.0f);  // ||code - mean||^2 of the slots
    METAREC_DISPATCH(measure_codes)(v, squares.data());
    if (bits == 32) find_clumps(squares);
    for (int64_t h = 0; h < heads; ++h) order_slots(h, squares.data() + h * codes);

    lay_out(&scan_memory_,
            [&](Arena& arena) { take_panels(arena, heads * v.panels, v.group, v.lanes, v.words, &v.scan); });
    METAREC_DISPATCH(pack_codebook)(v);
}

// Codes that share a cell of a grid may be near-equal; those within a small distance of the first of them are.
void PreparedCodebook::find_clumps(const std::vector<float>& squares) {
    constexpr double kCell = 0x1p-4, kRadius = 0x1p-12;  // of the codes' root mean square, per element and as a whole
    Codebook& v = view_;
    Clumps& clumps = v.clumps;
    const int64_t codes = v.codes, dim = v.dim, padded = v.panels * v.lanes * v.group;
    std::fill_n(clumps.of_code, v.heads * codes, -1);
    std::vector<std::vector<int32_t>> members(v.heads);
    std::vector<std::vector<int64_t>> first(v.heads);
    for (int64_t h = 0; h < v.heads; ++h) {
        const int64_t slots = v.slots[h];
        if (slots < kLeastClump) continue;
        const int32_t* code = v.code + h * padded;
        const float* original = v.original + h * codes * dim;
        // the median: codes of any norm may be few
        std::vector<float> sorted(slots);
        for (int64_t s = 0; s < slots; ++s) sorted[s] = squares[h * codes + code[s]];
        std::nth_element(sorted.begin(), sorted.begin() + slots / 2, sorted.end());
        const double typical = std::max(std::sqrt(static_cast<double>(sorted[slots / 2])), kLeastNorm);
        const float inverse = static_cast<float>(std::sqrt(static_cast<double>(dim)) / (typical * kCell));
        std::vector<uint64_t> cells(slots);
#pragma omp parallel for schedule(static) if (slots * dim > 1 << 15)
        for (int64_t s = 0; s < slots; ++s) {
            cells[s] = cell(original + code[s] * dim, v.mean + h * dim, dim, inverse);
        }
        // order by cell, then by index
        std::vector<std::pair<uint64_t, int32_t>> order(slots);
        for (int64_t s = 0; s < slots; ++s) order[s] = {cells[s], code[s]};
        std::sort(order.begin(), order.end());
        const double reach = typical * kRadius;
        for (int64_t begin = 0, end; begin < slots; begin = end) {
            for (end = begin + 1; end < slots && order[end].first == order[begin].first;) ++end;
            if (end - begin < kLeastClump) continue;
            const int32_t centre = order[begin].second;
            const size_t before = members[h].size();
            for (int64_t i = begin; i < end; ++i) {
                if (distance(original + order[i].second * dim, original + centre * dim, dim) <= reach) {
                    members[h].push_back(order[i].second);
                }
            }
            if (static_cast<int64_t>(members[h].size() - before) < kLeastClump) {
                members[h].resize(before);
                continue;
            }
            clumps.of_code[h * codes + centre] = static_cast<int32_t>(first[h].size());
            first[h].push_back(static_cast<int64_t>(before));
        }
        clumps.most = std::max(clumps.most, static_cast<int64_t>(first[h].size()));
    }
    if (clumps.most == 0) return;

    const int64_t width = v.lanes * kClumpGroup;
    int64_t panels = 0;
    std::vector<int64_t> panel;
    for (int64_t h = 0; h < v.heads; ++h) {
        int64_t of_head = 0;
        first[h].push_back(static_cast<int64_t>(members[h].size()));
        for (size_t j = 0; j + 1 < first[h].size(); ++j) of_head += (first[h][j + 1] - first[h][j] + width - 1) / width;
        panels = std::max(panels, of_head);
    }
    clumps.groups = panels * v.lanes;
    lay_out(&clump_memory_, [&](Arena& arena) {
        clumps.first = arena.take<int64_t>(v.heads * (clumps.most + 1));
        clumps.panel = arena.take<int64_t>(v.heads * clumps.most);
        clumps.radius = arena.take<float>(v.heads * clumps.most);
        clumps.members = arena.take<int32_t>(v.heads * codes);
        take_panels(arena, v.heads * panels, kClumpGroup, v.lanes, dim, &clumps.panels);
    });
    for (int64_t h = 0; h < v.heads; ++h) {
        int64_t* begin = clumps.first + h * (clumps.most + 1);
        std::fill_n(begin, clumps.most + 1, static_cast<int64_t>(members[h].size()));
        std::copy(first[h].begin(), first[h].end(), begin);
        std::copy(members[h].begin(), members[h].end(), clumps.members + h * codes);
        for (int64_t j = 0, at = h * panels; j < clumps.most; ++j) {
            clumps.panel[h * clumps.most + j] = at;
            at += (begin[j + 1] - begin[j] + width - 1) / width;
        }
        // only the first member of a clump stays a slot
        std::vector<uint8_t> leaves(codes, 0);
        for (int32_t member : members[h]) leaves[member] = clumps.of_code[h * codes + member] < 0;
        int32_t* code = v.code + h * padded;
        v.slots[h] = std::remove_if(code, code + v.slots[h], [&](int32_t k) { return leaves[k] != 0; }) - code;
    }
}

// Slots of large norm come last, clumps before them: what makes scores inexact stays in panels of its own.
void PreparedCodebook::order_slots(int64_t h, const float* squares) {
    constexpr double kLarge = 16;  // times the mean square
    Codebook& v = view_;
    int32_t* code = v.code + h * v.panels * v.lanes * v.group;
    const int64_t slots = v.slots[h];
    double sum = 0;
    for (int64_t s = 0; s < slots; ++s) sum += std::min(squares[code[s]], kMaxSquare);
    const float large = static_cast<float>(kLarge * sum / static_cast<double>(std::max<int64_t>(slots, 1)));
    const int32_t* clump = v.clumps.most == 0 ? nullptr : v.clumps.of_code + h * v.codes;
    auto rank = [&](int32_t k) { return squares[k] > large ? 2 : clump != nullptr && clump[k] >= 0 ? 1 : 0; };
    if (std::all_of(code, code + slots, [&](int32_t k) { return rank(k) == 0; })) return;
    std::stable_sort(code, code + slots, [&](int32_t a, int32_t b) { return rank(a) < rank(b); });
}

}  // namespace metarec
