// The members of near-duplicate clusters that can be the nearest code.
#pragma once

#include "vq/nearest_codeword/decision.h"
#include "vq/nearest_codeword/scan.h"

namespace metarec::METAREC_ISA {
namespace {

// Replaces codes that represent a cluster by its members that can be the nearest to a row, the i-th of the block.
// Returns the new number of candidates.
int64_t expand_clusters(const Search& search, int64_t h, int64_t row, int64_t i, const Workspace& w, int64_t count) {
    const Codebook& codebook = search.codebook;
    const Clusters& clusters = codebook.clusters;
    const int32_t* of_code = clusters.of_code + h * codebook.codes;
    const int64_t tile = i / kRows, dim = codebook.dim;
    bool any = false;
    for (int64_t c = 0; c < count; ++c) any |= of_code[w.candidates[c]] >= 0;
    if (!any) return count;
    // the groups of the candidates may contain further clusters, most of them too far away
    const CostError cost_error = measure_candidates(search, h, row, w.norm[i], w.candidates, w.cost, count);
    const float least = least_of(w.cost, count), M = search.products ? codebook.mean_length[h] : 0;
    const float nearest =
        search.products ? cost_error.reach(least) : __builtin_sqrtf(least) * (1 + cost_error.relative) + 0x1p-60f;
    const bool with_margin = wants_margin(search.out, row), all = with_margin || !(nearest < kInfinity);
    // whether no member of a cluster can be the nearest, given the cost of its first
    auto too_far = [&](float cost, float radius) {
        if (search.products) return cost - 1.001f * (w.norm[i] + M) * radius > nearest;
        return cost < kInfinity && __builtin_sqrtf(cost) > nearest + radius;
    };
    int64_t kept = 0, expanded = 0;
    for (int64_t c = 0; c < count; ++c) {
        const int32_t cluster = of_code[w.candidates[c]];
        if (cluster < 0) {
            w.candidates[kept++] = w.candidates[c];
        } else if (all || !too_far(w.cost[c], clusters.radius[h * clusters.most + cluster])) {
            w.expanded[expanded++] = cluster;
        }
    }
    for (int64_t o = 0; o < expanded; ++o) {
        const int64_t j = h * clusters.most + w.expanded[o];
        const int64_t* begin = clusters.first + h * (clusters.most + 1) + w.expanded[o];
        const int64_t width = kFloats * kClusterGroup, members = begin[1] - begin[0];
        const int64_t panels = (members + width - 1) / width,
                      group = clusters.panel[j] - clusters.panel[h * clusters.most];
        if (with_margin) {  // the second nearest may be any of them
            for (int64_t s = 0; s < members; ++s) {
                w.candidates[kept++] = clusters.members[h * codebook.codes + begin[0] + s];
            }
            continue;
        }
        float* maxima = w.cluster_maxima + group * kFloats;
        if (w.cluster_tile[w.expanded[o]] != tile) {
            w.cluster_tile[w.expanded[o]] = tile;
            for (int64_t p = 0; p < panels; ++p) {
                const int64_t vector = (clusters.panel[j] + p) * kClusterGroup * kFloats;
                scan<32>(w.words + tile * kRows * dim, nullptr, nullptr, clusters.panels.words + vector * dim,
                         clusters.panels.start + vector, 1, dim, kClusterGroup, maxima + p * kFloats, clusters.groups);
            }
        }
        const float radius = clusters.radius[j], norm = w.norm[i], Q = codebook.reach[h];
        const float unit = static_cast<float>(2 * dim + 16) * kUnit,
                    definition = static_cast<float>(dim + 4) * 0x1p-53f;
        const float error =
            1.001f * (search.products ? unit * radius * (norm + M) + definition * (norm + M) * (Q + radius + M)
                                      : unit * radius * (norm + Q + radius) + definition * (norm + Q) * (norm + Q)) +
            static_cast<float>(dim + 2) * 0x1p-120f;
        float errors[64 / kFloats];
        for (float& e : errors) e = error;
        maxima += i % kRows * clusters.groups;
        float least = -kInfinity;
        for (int64_t p = 0; p < panels; ++p) {
            const float of_panel = least_score(maxima + p * kFloats, errors, 1, false);
            least = least > of_panel ? least : of_panel;
        }
        for (int64_t p = 0; p < panels; ++p) {
            uint64_t bits = groups_above(maxima + p * kFloats, errors, 1, least);
            for (; bits != 0; bits &= bits - 1) {
                const int64_t first = (p * kFloats + __builtin_ctzll(bits)) * kClusterGroup;
                for (int64_t s = first; s < first + kClusterGroup && s < members; ++s) {
                    w.candidates[kept++] = clusters.members[h * codebook.codes + begin[0] + s];
                }
            }
        }
    }
    return kept;
}

}  // namespace
}  // namespace metarec::METAREC_ISA
