#include "core/bindings.h"

#include <algorithm>

#include "sampler/negatives.h"
#include "sampler/philox.h"
#include "sampler/seen.h"
#include "sampler/windows.h"

namespace py = pybind11;

namespace metarec {
namespace {

Randomness checked_randomness(uint64_t seed, uint64_t stream, int64_t step, Purpose purpose) {
    if (step < 0 || step >> 48) {
        throw std::invalid_argument("step must be in [0, 2**48), got " + std::to_string(step));
    }
    return make_randomness(seed, stream, uint64_t(step), purpose);
}

void check_first_row(int64_t first_row, int64_t rows) {
    if (first_row < 0 || first_row + rows > int64_t(1) << 32) {
        throw std::invalid_argument("first_row must be in [0, 2**32 - rows], got " + std::to_string(first_row));
    }
}

// Every row must be a user whose events lie inside items.
void check_users(const int64_t* users, int64_t rows, const int64_t* offsets, int64_t num_users, int64_t events) {
    for (int64_t b = 0; b < rows; ++b) {
        const int64_t u = users[b];
        if (u < 0 || u >= num_users) {
            throw std::invalid_argument("rows must be in [0, " + std::to_string(num_users) + "), got " +
                                        std::to_string(u));
        }
        if (offsets[u] < 0 || offsets[u] > offsets[u + 1] || offsets[u + 1] > events) {
            throw std::invalid_argument("offsets must rise from 0 to the number of items (" + std::to_string(events) +
                                        "), got " + std::to_string(offsets[u]) + " to " +
                                        std::to_string(offsets[u + 1]) + " for row " + std::to_string(u));
        }
    }
}

void check_segments(const NegativeRows& in, int64_t positions) {
    bool rising = in.segments[0] == 0 && in.segments[in.rows] == positions;
    for (int64_t b = 0; b < in.rows && rising; ++b) rising = in.segments[b] <= in.segments[b + 1];
    if (!rising) throw std::invalid_argument("segments must rise from 0");
    for (int64_t b = 0; b < in.rows; ++b) {
        // two slots share a block, and the counter has 32 bits for blocks
        if (in.segments[b + 1] - in.segments[b] > (int64_t(1) << 33) / std::max<int64_t>(in.count, 1)) {
            throw std::invalid_argument("a row can draw 2**33 negatives at most, position " + std::to_string(b) +
                                        " of rows asks for more");
        }
    }
}

// names[b]: what the caller calls row b
void check_unseen(const NegativeRows& in, const int64_t* seen_weights, const int64_t* names) {
    for (int64_t b = 0; b < in.rows; ++b) {
        const int64_t u = in.users[b];
        const bool all = seen_weights ? uint64_t(seen_weights[u]) >= uint64_t(in.num_items) * kCapacity
                                      : in.seen_counts[u] >= in.num_items;
        if (all && in.segments[b + 1] > in.segments[b]) {
            throw std::invalid_argument("row " + std::to_string(names[b]) +
                                        " has seen every item that could be drawn (" +
                                        std::to_string(in.seen_counts[u]) + " of " + std::to_string(in.num_items) +
                                        "): no negative exists; leave such users out");
        }
    }
}

// popularity without cells: uniform
void draw_negatives(const NegativeRows& in, const Popularity& popularity, const int64_t* names, int64_t num_users,
                    int64_t positions) {
    check_first_row(in.first_row, in.rows);
    check_segments(in, positions);
    for (int64_t b = 0; b < in.rows; ++b) {
        if (in.users[b] < 0 || in.users[b] >= num_users) {
            throw std::invalid_argument("rows must be in [0, " + std::to_string(num_users) + "), got " +
                                        std::to_string(in.users[b]));
        }
    }
    if (in.count == 0) return;
    check_unseen(in, popularity.seen_weights, names);
    py::gil_scoped_release release;
    if (popularity.cells == nullptr) {
        METAREC_DISPATCH(uniform_negatives)(in);
    } else {
        METAREC_DISPATCH(popular_negatives)(in, popularity);
    }
}

// What the batches of a sampler have in common, so that a batch costs two calls. The arrays belong to the caller.
struct EpochBatches {
    Sequences data;
    const int64_t* starts;
    int64_t num_users, events, max_length, stride, num_items, count;
    Window window;
    uint64_t seed, stream;
    const int64_t* seen_offsets;
    const int64_t* seen_counts;
    const void* seen;
    bool seen_wide;
    Popularity popularity;

    // The windows at places [first, first + rows) of an epoch: users, begins, packed; returns the number of positions.
    int64_t plan(uintptr_t users, uintptr_t begins, uintptr_t packed, int64_t first, int64_t rows, int64_t epoch,
                 int64_t step) const {
        const Randomness order = checked_randomness(seed, stream, epoch, Purpose::permutation);
        const Randomness crop = checked_randomness(seed, stream, step, Purpose::crop);
        const int64_t size = starts[num_users];
        if (first < 0 || rows < 0 || first + rows > size) {
            throw std::invalid_argument("first and count must lie in the epoch of " + std::to_string(size) +
                                        " windows, got " + std::to_string(first) + " and " + std::to_string(rows));
        }
        check_first_row(0, rows);
        auto* const ids = pointer<int64_t>(begins);  // until the windows' begins take their place
        auto* const index = pointer<int64_t>(packed) + 1;
        auto* const found = pointer<int64_t>(users);
        {
            py::gil_scoped_release release;
            epoch_order(order, size, first, rows, ids);
            locate_windows(starts, num_users, ids, rows, found, index);
        }
        check_users(found, rows, data.offsets, num_users, events);
        py::gil_scoped_release release;
        plan_windows(data, found, index, rows, 0, window, max_length, stride, crop, ids, pointer<int64_t>(packed));
        return pointer<int64_t>(packed)[rows];
    }

    void fill(uintptr_t users, uintptr_t begins, uintptr_t packed, uintptr_t inputs, uintptr_t targets,
              uintptr_t negatives, uintptr_t logq, int64_t rows, int64_t step) const {
        const auto* const segments = pointer<const int64_t>(packed);
        {
            py::gil_scoped_release release;
            copy_windows(data, pointer<const int64_t>(begins), segments, rows, pointer<int64_t>(inputs),
                         pointer<int64_t>(targets));
        }
        if (count == 0) return;
        const auto* const found = pointer<const int64_t>(users);
        draw_negatives({found, segments, rows, 0, count, num_items, seen_offsets, seen_counts, seen, seen_wide,
                        checked_randomness(seed, stream, step, Purpose::negative), pointer<int64_t>(negatives),
                        pointer<float>(logq)},
                       popularity, found, num_users, segments[rows]);
    }
};

}  // namespace

void bind_sampler(py::module_& m) {
    m.def("philox", [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
        const PhiloxBlock block = philox(c0, c1, c2, c3, k0, k1);
        return py::make_tuple(block.word[0], block.word[1], block.word[2], block.word[3]);
    });

    m.def(
        "epoch_order",
        [](uintptr_t out, int64_t size, int64_t first, int64_t count, uint64_t seed, uint64_t stream, int64_t epoch) {
            const Randomness random = checked_randomness(seed, stream, epoch, Purpose::permutation);
            py::gil_scoped_release release;
            epoch_order(random, size, first, count, pointer<int64_t>(out));
        },
        py::arg("out"), py::kw_only(), py::arg("size"), py::arg("first"), py::arg("count"), py::arg("seed"),
        py::arg("stream"), py::arg("epoch"));

    m.def(
        "plan_windows",
        [](uintptr_t offsets, uintptr_t users, uintptr_t index, uintptr_t begins, uintptr_t packed, int64_t num_users,
           int64_t events, int64_t rows, int64_t first_row, int window, int64_t max_length, int64_t stride,
           uint64_t seed, uint64_t stream, int64_t step) {
            const Randomness random = checked_randomness(seed, stream, step, Purpose::crop);
            check_first_row(first_row, rows);
            check_users(pointer<const int64_t>(users), rows, pointer<const int64_t>(offsets), num_users, events);
            py::gil_scoped_release release;
            plan_windows({pointer<const int64_t>(offsets), nullptr, false}, pointer<const int64_t>(users),
                         pointer<const int64_t>(index), rows, first_row, Window(window), max_length, stride, random,
                         pointer<int64_t>(begins), pointer<int64_t>(packed));
            return pointer<int64_t>(packed)[rows];
        },
        py::arg("offsets"), py::arg("users"), py::arg("index"), py::arg("begins"), py::arg("packed"), py::kw_only(),
        py::arg("num_users"), py::arg("events"), py::arg("rows"), py::arg("first_row"), py::arg("window"),
        py::arg("max_length"), py::arg("stride"), py::arg("seed"), py::arg("stream"), py::arg("step"));

    m.def(
        "copy_windows",
        [](uintptr_t items, uintptr_t begins, uintptr_t packed, uintptr_t inputs, uintptr_t targets, int64_t rows,
           bool wide) {
            py::gil_scoped_release release;
            copy_windows({nullptr, pointer<const void>(items), wide}, pointer<const int64_t>(begins),
                         pointer<const int64_t>(packed), rows, pointer<int64_t>(inputs), pointer<int64_t>(targets));
        },
        py::arg("items"), py::arg("begins"), py::arg("packed"), py::arg("inputs"), py::arg("targets"), py::kw_only(),
        py::arg("rows"), py::arg("wide"));

    m.def(
        "row_lengths",
        [](uintptr_t offsets, uintptr_t users, uintptr_t seen_offsets, int64_t num_users, int64_t events,
           int64_t rows) {
            check_users(pointer<const int64_t>(users), rows, pointer<const int64_t>(offsets), num_users, events);
            py::gil_scoped_release release;
            row_lengths({pointer<const int64_t>(offsets), nullptr, false}, pointer<const int64_t>(users), rows,
                        pointer<int64_t>(seen_offsets));
            return pointer<int64_t>(seen_offsets)[rows];
        },
        py::arg("offsets"), py::arg("users"), py::arg("seen_offsets"), py::kw_only(), py::arg("num_users"),
        py::arg("events"), py::arg("rows"));

    m.def(
        "sorted_items",
        [](uintptr_t offsets, uintptr_t items, uintptr_t users, uintptr_t seen_offsets, uintptr_t seen,
           uintptr_t counts, int64_t rows, int64_t num_items, bool wide, bool seen_wide) {
            int64_t bad = -1;
            {
                py::gil_scoped_release release;
                bad = sorted_items({pointer<const int64_t>(offsets), pointer<const void>(items), wide},
                                   pointer<const int64_t>(users), rows, num_items, seen_wide,
                                   pointer<const int64_t>(seen_offsets), pointer<void>(seen), pointer<int64_t>(counts));
            }
            if (bad >= 0) {
                throw std::invalid_argument("items must be in [0, " + std::to_string(num_items) + "), but row " +
                                            std::to_string(pointer<const int64_t>(users)[bad]) +
                                            " holds one that is not");
            }
        },
        py::arg("offsets"), py::arg("items"), py::arg("users"), py::arg("seen_offsets"), py::arg("seen"),
        py::arg("counts"), py::kw_only(), py::arg("rows"), py::arg("num_items"), py::arg("wide"), py::arg("seen_wide"));

    m.def(
        "row_weights",
        [](uintptr_t seen_offsets, uintptr_t counts, uintptr_t seen, uintptr_t cumulative, uintptr_t weights,
           int64_t rows) {
            py::gil_scoped_release release;
            row_weights(pointer<const int64_t>(seen_offsets), pointer<const int64_t>(counts),
                        pointer<const int32_t>(seen), rows, pointer<const int64_t>(cumulative),
                        pointer<int64_t>(weights));
        },
        py::arg("seen_offsets"), py::arg("counts"), py::arg("seen"), py::arg("cumulative"), py::arg("weights"),
        py::kw_only(), py::arg("rows"));

    m.def(
        "build_alias",
        [](uintptr_t weights, uintptr_t cells, int64_t size) {
            bool exact = false;
            {
                py::gil_scoped_release release;
                exact = build_alias(pointer<const int64_t>(weights), size, pointer<AliasCell>(cells));
            }
            if (!exact) throw std::invalid_argument("weights must be non-negative and sum to 2**32 times their number");
        },
        py::arg("weights"), py::arg("cells"), py::kw_only(), py::arg("size"));

    py::class_<EpochBatches>(m, "EpochBatches")
        .def(py::init([](uintptr_t offsets, uintptr_t items, uintptr_t starts, uintptr_t seen_offsets, uintptr_t counts,
                         uintptr_t seen, uintptr_t cells, uintptr_t cumulative, uintptr_t seen_weights,
                         int64_t num_users, int64_t events, int64_t num_items, bool wide, bool seen_wide, int window,
                         int64_t max_length, int64_t stride, int64_t count, uint64_t seed, uint64_t stream) {
                 return EpochBatches{{pointer<const int64_t>(offsets), pointer<const void>(items), wide},
                                     pointer<const int64_t>(starts),
                                     num_users,
                                     events,
                                     max_length,
                                     stride,
                                     num_items,
                                     count,
                                     Window(window),
                                     seed,
                                     stream,
                                     pointer<const int64_t>(seen_offsets),
                                     pointer<const int64_t>(counts),
                                     pointer<const void>(seen),
                                     seen_wide,
                                     {pointer<const AliasCell>(cells), pointer<const int64_t>(cumulative),
                                      pointer<const int64_t>(seen_weights)}};
             }),
             py::kw_only(), py::arg("offsets"), py::arg("items"), py::arg("starts"), py::arg("seen_offsets"),
             py::arg("counts"), py::arg("seen"), py::arg("cells"), py::arg("cumulative"), py::arg("seen_weights"),
             py::arg("num_users"), py::arg("events"), py::arg("num_items"), py::arg("wide"), py::arg("seen_wide"),
             py::arg("window"), py::arg("max_length"), py::arg("stride"), py::arg("count"), py::arg("seed"),
             py::arg("stream"))
        .def("plan", &EpochBatches::plan)
        .def("fill", &EpochBatches::fill);

    // cells, cumulative and seen_weights are 0 for uniform negatives.
    m.def(
        "sample_negatives",
        [](uintptr_t users, uintptr_t names, uintptr_t segments, uintptr_t seen_offsets, uintptr_t counts,
           uintptr_t seen, uintptr_t negatives, uintptr_t logq, uintptr_t cells, uintptr_t cumulative,
           uintptr_t seen_weights, int64_t rows, int64_t num_users, int64_t positions, int64_t first_row, int64_t count,
           int64_t num_items, bool wide, bool shared, uint64_t seed, uint64_t stream, int64_t step) {
            draw_negatives(
                {pointer<const int64_t>(users), pointer<const int64_t>(segments), rows, first_row, count, num_items,
                 pointer<const int64_t>(seen_offsets), pointer<const int64_t>(counts), pointer<const void>(seen), wide,
                 checked_randomness(seed, stream, step, shared ? Purpose::shared : Purpose::negative),
                 pointer<int64_t>(negatives), pointer<float>(logq)},
                {pointer<const AliasCell>(cells), pointer<const int64_t>(cumulative),
                 pointer<const int64_t>(seen_weights)},
                pointer<const int64_t>(names), num_users, positions);
        },
        py::arg("users"), py::arg("names"), py::arg("segments"), py::arg("seen_offsets"), py::arg("counts"),
        py::arg("seen"), py::arg("negatives"), py::arg("logq"), py::arg("cells"), py::arg("cumulative"),
        py::arg("seen_weights"), py::kw_only(), py::arg("rows"), py::arg("num_users"), py::arg("positions"),
        py::arg("first_row"), py::arg("count"), py::arg("num_items"), py::arg("wide"), py::arg("shared"),
        py::arg("seed"), py::arg("stream"), py::arg("step"));
}

}  // namespace metarec
