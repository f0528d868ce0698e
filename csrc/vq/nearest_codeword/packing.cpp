// Codes as the panels that the scan reads, with the errors of their scores; nearest_codeword.cpp derives the errors.
#include "vq/nearest_codeword/packing.h"

namespace metarec::METAREC_ISA {
namespace {

// Packs one code minus `mean`, its first word at `word`. Returns a bound on what integers leave out of it.
inline float pack_code(const float* row, const float* mean, int64_t dim, int bits, float scale, uint32_t* word) {
    if (bits < 32) {
        int32_t total;
        return norm_bound(to_integers(row, mean, dim, bits, scale, true, word, kFloats, &total), dim);
    }
    for (int64_t d = 0; d < dim; ++d) {
        const float value = row[d] - mean[d];
        std::memcpy(word + d * kFloats, &value, sizeof value);
    }
    return 0;
}

inline void pack_nothing(int64_t words, uint32_t* word, float* start) {
    for (int64_t j = 0; j < words; ++j) word[j * kFloats] = 0;
    *start = -kInfinity;
}

// (row - from).mean in float64.
inline double product_with_mean(const float* row, const float* from, const float* mean, int64_t dim) {
    constexpr int kDoubles = kFloats / 2;
    vdouble sum = {};
    int64_t d = 0;
    for (; d + kDoubles <= dim; d += kDoubles) {
        sum += load_doubles(mean + d) * (load_doubles(row + d) - load_doubles(from + d));
    }
    double total = 0;
    for (int lane = 0; lane < kDoubles; ++lane) total += sum[lane];
    for (; d < dim; ++d) total += static_cast<double>(mean[d]) * (static_cast<double>(row[d]) - from[d]);
    return total;
}

// A panel of slots, and the errors of its scores.
void pack_panel(const Codebook& codebook, int64_t h, int64_t p) {
    const int64_t dim = codebook.dim, group = codebook.group, width = kFloats * group;
    const int64_t panel = h * codebook.panels + p, slots = codebook.slots[h] - p * width;
    const int32_t* code = codebook.code + panel * width;
    const int32_t* cluster = codebook.clusters.most == 0 ? nullptr : codebook.clusters.of_code + h * codebook.codes;
    const float* mean = codebook.mean + h * dim;
    const float* original = codebook.original + h * codebook.codes * dim;
    float largest = 0, q = 0, Q = 0, radius = 0;
    for (int64_t s = 0; s < width && s < slots; ++s) {
        float square;
        const float most = measure(original + code[s] * dim, mean, dim, &square);
        largest = largest > most ? largest : most;
        if (cluster != nullptr && cluster[code[s]] >= 0) {
            const float reach = codebook.clusters.radius[h * codebook.clusters.most + cluster[code[s]]];
            radius = radius > reach ? radius : reach;
        }
    }
    const bool fits = largest >= kSmallest, products = codebook.metric == Metric::product;
    const bool integers = codebook.bits < 32;
    const float scale = integers && fits ? largest / most_of(codebook.bits) : 1;
    for (int64_t s = 0; s < width; ++s) {
        const int64_t lane = s / group, v = s % group;
        uint32_t* word = codebook.scan.words + (panel * group + v) * codebook.words * kFloats + lane;
        float* start = codebook.scan.start + (panel * group + v) * kFloats + lane;
        if (s >= slots) {
            pack_nothing(codebook.words, word, start);
            continue;
        }
        const float* row = original + code[s] * dim;
        float square;
        measure(row, mean, dim, &square);
        *start = products ? static_cast<float>(product_with_mean(row, mean, mean, dim)) : -0.5f * square;
        const float norm = norm_bound(square, dim);
        const float rounding = pack_code(row, mean, dim, codebook.bits, scale, word);
        Q = Q > norm ? Q : norm;
        q = q > rounding ? q : rounding;
    }
    if (integers && !fits) q = kInfinity;  // too small for integers
    Q += q;
    const float unit = static_cast<float>(integers ? dim + 16 : 2 * dim + 16) * kUnit;
    const float definition = static_cast<float>(dim + 4) * 0x1p-53f, slack = 1.001f;
    const int64_t at = h * padded_panels(codebook) + p;
    codebook.scan.scale[panel] = scale;
    codebook.by_rounding[at] = integers ? slack * Q : 0;  // float32 rows are not rounded, and infinity times 0 is NaN
    const float underflow = static_cast<float>(dim + 2) * 0x1p-120f;
    if (products) {
        const float M = codebook.mean_length[h], of_definition = definition * (Q + radius + M);
        codebook.by_norm[at] = slack * (q + radius + unit * Q + of_definition);
        codebook.constant[at] = slack * (M * (radius + unit * Q + of_definition)) + underflow;
        return;
    }
    codebook.by_norm[at] = slack * (q + radius + unit * Q + 2 * definition * Q);
    codebook.constant[at] = slack * (Q * radius + (0.5f * unit + definition) * Q * Q) + underflow;
}

// The members of a cluster as differences from the first of them.
void pack_cluster(const Codebook& codebook, int64_t h, int64_t j) {
    const Clusters& clusters = codebook.clusters;
    const int64_t dim = codebook.dim, width = kFloats * kClusterGroup;
    const int64_t* begin = clusters.first + h * (clusters.most + 1) + j;
    const int32_t* member = clusters.members + h * codebook.codes + begin[0];
    const float* original = codebook.original + h * codebook.codes * dim;
    const float* mean = codebook.mean + h * dim;
    const int64_t members = begin[1] - begin[0];
    float radius = 0;
    for (int64_t i = 0; i < (members + width - 1) / width * width; ++i) {
        const int64_t panel = clusters.panel[h * clusters.most + j] + i / width;
        const int64_t lane = i % width / kClusterGroup, vector = panel * kClusterGroup + i % kClusterGroup;
        uint32_t* word = clusters.panels.words + vector * dim * kFloats + lane;
        float* start = clusters.panels.start + vector * kFloats + lane;
        if (i >= members) {
            pack_nothing(dim, word, start);
            continue;
        }
        const float* first = original + member[0] * dim;
        const float* row = original + member[i] * dim;
        float square;
        measure(row, first, dim, &square);
        pack_code(row, first, dim, 32, 1, word);
        if (codebook.metric == Metric::product) {
            *start = static_cast<float>(product_with_mean(row, first, mean, dim));
        } else {
            double along = 0;
            for (int64_t d = 0; d < dim; ++d) {
                along += (static_cast<double>(first[d]) - mean[d]) * (static_cast<double>(row[d]) - first[d]);
            }
            *start = -static_cast<float>(along + 0.5 * square);
        }
        const float reach = norm_bound(square, dim);
        radius = radius > reach ? radius : reach;
    }
    clusters.radius[h * clusters.most + j] = radius;
}

}  // namespace

int64_t codebook_lanes() { return kFloats; }

int screen_bits(int64_t dim) {
    if (!kScreens || dim < 8 || dim > kWide) return 32;
    return dim <= kNarrow ? 16 : 8;
}

void measure_codes(const Codebook& codebook, float* squares) {
    const int64_t dim = codebook.dim, width = kFloats * codebook.group;
    for (int64_t h = 0; h < codebook.heads; ++h) {
        const int32_t* code = codebook.code + h * codebook.panels * width;
        float reach = 0;
#pragma omp parallel for schedule(static) reduction(max : reach) if (codebook.slots[h] * dim > 1 << 15)
        for (int64_t s = 0; s < codebook.slots[h]; ++s) {
            float square;
            measure(codebook.original + (h * codebook.codes + code[s]) * dim, codebook.mean + h * dim, dim, &square);
            squares[h * codebook.codes + code[s]] = square;
            const float norm = norm_bound(square, dim);
            reach = reach > norm ? reach : norm;
            if (codebook.metric == Metric::product) {
                codebook.length[h * codebook.codes + code[s]] =
                    length(codebook.original + (h * codebook.codes + code[s]) * dim, dim);
            }
        }
        codebook.reach[h] = reach;
        if (codebook.metric != Metric::product) continue;
        codebook.mean_length[h] = length(codebook.mean + h * dim, dim);
        float most = 0, sum = 0;
        for (int64_t s = 0; s < codebook.slots[h]; ++s) {
            const float of_code = codebook.length[h * codebook.codes + code[s]];
            most = of_code > most ? of_code : most;
            sum += of_code;
        }
        const bool alike = most * static_cast<float>(codebook.slots[h]) <= 4 * sum && most < kInfinity;
        codebook.one_length[h] = alike ? most : 0;
    }
}

void pack_codebook(const Codebook& codebook) {
    const bool large = codebook.heads * codebook.codes * codebook.dim > 1 << 15;
    if (codebook.clusters.most > 0) {
#pragma omp parallel for schedule(dynamic) if (large)
        for (int64_t i = 0; i < codebook.heads * codebook.clusters.most; ++i) {
            pack_cluster(codebook, i / codebook.clusters.most, i % codebook.clusters.most);
        }
    }
#pragma omp parallel for schedule(static) if (large)
    for (int64_t i = 0; i < codebook.heads * codebook.panels; ++i) {
        const int64_t h = i / codebook.panels, p = i % codebook.panels;
        if (p < used_panels(codebook, h)) pack_panel(codebook, h, p);
    }
    // what no panel uses is read with whole vectors of errors
    for (int64_t h = 0; h < codebook.heads; ++h) {
        for (int64_t p = used_panels(codebook, h); p < padded_panels(codebook); ++p) {
            const int64_t at = h * padded_panels(codebook) + p;
            codebook.by_rounding[at] = codebook.by_norm[at] = codebook.constant[at] = 0;
        }
    }
}

}  // namespace metarec::METAREC_ISA
