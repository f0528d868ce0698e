#include "vq/nearest_codeword/prepared_codebook.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "vq/nearest_codeword/hash.h"
#include "vq/nearest_codeword/near_duplicates.h"
#include "vq/nearest_codeword/nearest_codeword.h"

namespace metarec {
namespace {

constexpr std::align_val_t kAlignment{64};

// Equal codes hash equally (adding zero turns -0 into 0); 0 for a code with a NaN or an infinity.
uint64_t hash_of(const float* code, int64_t dim) {
    Hash hash;
    bool finite = true;
    auto mix = [&](int64_t d, int j) {
        const float value = code[d] + 0.0f;
        hash.add(j, value);
        finite &= std::fabs(value) <= std::numeric_limits<float>::max();
    };
    int64_t d = 0;
    for (; d + Hash::kChains <= dim; d += Hash::kChains) {
        for (int j = 0; j < Hash::kChains; ++j) mix(d + j, j);
    }
    for (; d < dim; ++d) mix(d, 0);
    return finite ? hash.value() | 1 : 0;
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
        v.clusters.of_code = bits < 32 ? nullptr : arena.take<int32_t>(heads * codes);
    });

    const bool large = heads * codes * dim > 1 << 15;
    std::vector<uint64_t> hashes(heads * codes);
#pragma omp parallel for schedule(static) if (large)
    for (int64_t k = 0; k < heads * codes; ++k) hashes[k] = hash_of(codebook + k * dim, dim);
#pragma omp parallel for schedule(dynamic) if (heads > 1 && large)
    for (int64_t h = 0; h < heads; ++h) {
        int32_t* code = v.code + h * padded;
        v.slots[h] = distinct_codes(codebook + h * codes * dim, hashes.data() + h * codes, codes, dim, code,
                                    v.duplicated + h * codes);
        mean_code(codebook + h * codes * dim, code, v.slots[h], dim, v.mean + h * dim);
    }
    std::vector<float> squares(heads * codes, 0.0f);  // ||code - mean||^2 of the slots
    METAREC_DISPATCH(measure_codes)(v, squares.data());
    if (bits == 32) add_clusters(squares.data());
    for (int64_t h = 0; h < heads; ++h) order_slots(h, squares.data() + h * codes);

    lay_out(&scan_memory_,
            [&](Arena& arena) { take_panels(arena, heads * v.panels, v.group, v.lanes, v.words, &v.scan); });
    METAREC_DISPATCH(pack_codebook)(v);
}

// Near-duplicates enter the scan as one slot, the first of them; their members are laid out in panels of their own.
void PreparedCodebook::add_clusters(const float* squares) {
    Codebook& v = view_;
    Clusters& clusters = v.clusters;
    const int64_t codes = v.codes, dim = v.dim, padded = v.panels * v.lanes * v.group;
    const int64_t width = v.lanes * kClusterGroup;
    std::fill_n(clusters.of_code, v.heads * codes, -1);
    std::vector<NearDuplicates> near(v.heads);
    int64_t panels = 0;
    for (int64_t h = 0; h < v.heads; ++h) {
        near[h] = find_near_duplicates(v.original + h * codes * dim, v.code + h * padded, v.slots[h], dim,
                                       v.mean + h * dim, squares + h * codes);
        const std::vector<int64_t>& first = near[h].first;
        int64_t of_head = 0;
        for (size_t j = 0; j + 1 < first.size(); ++j) of_head += (first[j + 1] - first[j] + width - 1) / width;
        panels = std::max(panels, of_head);
        clusters.most = std::max(clusters.most, static_cast<int64_t>(first.size()) - 1);
    }
    if (clusters.most == 0) return;

    clusters.groups = panels * v.lanes;
    lay_out(&cluster_memory_, [&](Arena& arena) {
        clusters.first = arena.take<int64_t>(v.heads * (clusters.most + 1));
        clusters.panel = arena.take<int64_t>(v.heads * clusters.most);
        clusters.radius = arena.take<float>(v.heads * clusters.most);
        clusters.members = arena.take<int32_t>(v.heads * codes);
        take_panels(arena, v.heads * panels, kClusterGroup, v.lanes, dim, &clusters.panels);
    });
    for (int64_t h = 0; h < v.heads; ++h) {
        const auto& [members, first] = near[h];
        int64_t* begin = clusters.first + h * (clusters.most + 1);
        std::fill_n(begin, clusters.most + 1, first.back());
        std::copy(first.begin(), first.end(), begin);
        std::copy(members.begin(), members.end(), clusters.members + h * codes);
        for (int64_t j = 0, at = h * panels; j < clusters.most; ++j) {
            clusters.panel[h * clusters.most + j] = at;
            at += (begin[j + 1] - begin[j] + width - 1) / width;
        }
        std::vector<uint8_t> leaves(codes, 0);
        for (int32_t member : members) leaves[member] = 1;
        for (size_t j = 0; j + 1 < first.size(); ++j) {
            const int32_t representative = members[first[j]];
            clusters.of_code[h * codes + representative] = static_cast<int32_t>(j);
            leaves[representative] = 0;
        }
        int32_t* code = v.code + h * padded;
        v.slots[h] = std::remove_if(code, code + v.slots[h], [&](int32_t k) { return leaves[k] != 0; }) - code;
    }
}

// Slots of large norm come last, clusters before them: what makes scores inexact stays in panels of its own.
void PreparedCodebook::order_slots(int64_t h, const float* squares) {
    constexpr double kLarge = 16;  // times the mean square
    Codebook& v = view_;
    int32_t* code = v.code + h * v.panels * v.lanes * v.group;
    const int64_t slots = v.slots[h];
    double sum = 0;
    for (int64_t s = 0; s < slots; ++s) sum += std::min(squares[code[s]], kMaxSquare);
    const float large = static_cast<float>(kLarge * sum / static_cast<double>(std::max<int64_t>(slots, 1)));
    const int32_t* cluster = v.clusters.most == 0 ? nullptr : v.clusters.of_code + h * v.codes;
    auto rank = [&](int32_t k) { return squares[k] > large ? 2 : cluster != nullptr && cluster[k] >= 0 ? 1 : 0; };
    if (std::all_of(code, code + slots, [&](int32_t k) { return rank(k) == 0; })) return;
    std::stable_sort(code, code + slots, [&](int32_t a, int32_t b) { return rank(a) < rank(b); });
}

}  // namespace metarec
