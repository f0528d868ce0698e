#include "core/bindings.h"

#include <pybind11/stl.h>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "sampler/checks.h"
#include "sampler/epoch_batches.h"
#include "sampler/epoch_order.h"
#include "sampler/negatives.h"
#include "sampler/philox.h"
#include "sampler/seen.h"
#include "sampler/windows.h"

namespace py = pybind11;

namespace metarec {
namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;

Sequences as_sequences(uintptr_t offsets, uintptr_t items, bool wide) {
    const auto* const begins = pointer<const int64_t>(offsets);
    return {begins, begins + 1, pointer<const void>(items), wide};
}

}  // namespace

void bind_sampler(py::module_& m) {
    m.def("philox", [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
        const PhiloxBlock block = philox(c0, c1, c2, c3, k0, k1);
        return py::make_tuple(block.word[0], block.word[1], block.word[2], block.word[3]);
    });

    m.def(
        "epoch_order",
        [](uintptr_t out, int64_t size, int64_t first, int64_t count, uint64_t seed, uint64_t stream, int64_t epoch) {
            METAREC_DISPATCH(epoch_order)(checked_randomness(seed, stream, epoch, Purpose::permutation), size, first,
                                          count, pointer<int64_t>(out));
        },
        NoGil(), py::arg("out"), py::kw_only(), py::arg("size"), py::arg("first"), py::arg("count"), py::arg("seed"),
        py::arg("stream"), py::arg("epoch"));

    m.def(
        "plan_windows",
        [](uintptr_t offsets, uintptr_t users, uintptr_t index, uintptr_t begins, uintptr_t packed, int64_t num_users,
           int64_t events, int64_t rows, int64_t first_row, int window, int64_t max_length, int64_t stride,
           uint64_t seed, uint64_t stream, int64_t step) {
            const Randomness random = checked_randomness(seed, stream, step, Purpose::crop);
            const Sequences data = as_sequences(offsets, 0, false);
            check_first_row(first_row, rows);
            check_users(pointer<const int64_t>(users), rows, data, num_users, events);
            plan_windows(data, pointer<const int64_t>(users), pointer<const int64_t>(index), rows, first_row,
                         Window(window), max_length, stride, random, pointer<int64_t>(begins),
                         pointer<int64_t>(packed));
            return pointer<int64_t>(packed)[rows];
        },
        NoGil(), py::arg("offsets"), py::arg("users"), py::arg("index"), py::arg("begins"), py::arg("packed"),
        py::kw_only(), py::arg("num_users"), py::arg("events"), py::arg("rows"), py::arg("first_row"),
        py::arg("window"), py::arg("max_length"), py::arg("stride"), py::arg("seed"), py::arg("stream"),
        py::arg("step"));

    m.def(
        "copy_windows",
        [](uintptr_t items, uintptr_t begins, uintptr_t packed, uintptr_t inputs, uintptr_t targets, int64_t rows,
           bool wide) {
            copy_windows({nullptr, nullptr, pointer<const void>(items), wide}, pointer<const int64_t>(begins),
                         pointer<const int64_t>(packed), rows, pointer<int64_t>(inputs), pointer<int64_t>(targets));
        },
        NoGil(), py::arg("items"), py::arg("begins"), py::arg("packed"), py::arg("inputs"), py::arg("targets"),
        py::kw_only(), py::arg("rows"), py::arg("wide"));

    m.def(
        "pad_rows",
        [](uintptr_t values, uintptr_t offsets, uintptr_t out, int64_t rows, int64_t positions, int64_t length,
           int64_t count, bool left, bool wide, int64_t fill) {
            const auto* const bounds = pointer<const int64_t>(offsets);
            const Side side = left ? Side::left : Side::right;
            check_offsets(bounds, rows, positions);
            if (wide) {
                pad_rows(pointer<const int64_t>(values), bounds, rows, length, count, side, fill,
                         pointer<int64_t>(out));
            } else {
                pad_rows(pointer<const int32_t>(values), bounds, rows, length, count, side, int32_t(fill),
                         pointer<int32_t>(out));
            }
        },
        NoGil(), py::arg("values"), py::arg("offsets"), py::arg("out"), py::kw_only(), py::arg("rows"),
        py::arg("positions"), py::arg("length"), py::arg("count"), py::arg("left"), py::arg("wide"), py::arg("fill"));

    m.def(
        "row_lengths",
        [](uintptr_t offsets, uintptr_t users, uintptr_t seen_offsets, int64_t num_users, int64_t events,
           int64_t rows) {
            const Sequences data = as_sequences(offsets, 0, false);
            check_users(pointer<const int64_t>(users), rows, data, num_users, events);
            row_lengths(data, pointer<const int64_t>(users), rows, pointer<int64_t>(seen_offsets));
            return pointer<int64_t>(seen_offsets)[rows];
        },
        NoGil(), py::arg("offsets"), py::arg("users"), py::arg("seen_offsets"), py::kw_only(), py::arg("num_users"),
        py::arg("events"), py::arg("rows"));

    m.def(
        "sorted_items",
        [](uintptr_t offsets, uintptr_t items, uintptr_t users, uintptr_t seen_offsets, uintptr_t seen,
           uintptr_t counts, int64_t rows, int64_t num_items, bool wide, bool seen_wide) {
            const int64_t bad = sorted_items(as_sequences(offsets, items, wide), pointer<const int64_t>(users), rows,
                                             num_items, seen_wide, pointer<const int64_t>(seen_offsets),
                                             pointer<void>(seen), pointer<int64_t>(counts));
            if (bad >= 0) {
                throw std::invalid_argument("items must be in [0, " + std::to_string(num_items) + "), but row " +
                                            std::to_string(pointer<const int64_t>(users)[bad]) +
                                            " holds one that is not");
            }
        },
        NoGil(), py::arg("offsets"), py::arg("items"), py::arg("users"), py::arg("seen_offsets"), py::arg("seen"),
        py::arg("counts"), py::kw_only(), py::arg("rows"), py::arg("num_items"), py::arg("wide"), py::arg("seen_wide"));

    m.def(
        "row_weights",
        [](uintptr_t seen_offsets, uintptr_t counts, uintptr_t seen, uintptr_t cumulative, uintptr_t weights,
           int64_t rows) {
            row_weights(pointer<const int64_t>(seen_offsets), pointer<const int64_t>(counts),
                        pointer<const int32_t>(seen), rows, pointer<const int64_t>(cumulative),
                        pointer<int64_t>(weights));
        },
        NoGil(), py::arg("seen_offsets"), py::arg("counts"), py::arg("seen"), py::arg("cumulative"), py::arg("weights"),
        py::kw_only(), py::arg("rows"));

    m.def(
        "build_alias",
        [](uintptr_t weights, uintptr_t cells, int64_t size) {
            if (!build_alias(pointer<const int64_t>(weights), size, pointer<AliasCell>(cells))) {
                throw std::invalid_argument("weights must be non-negative and sum to 2**32 times their number");
            }
        },
        NoGil(), py::arg("weights"), py::arg("cells"), py::kw_only(), py::arg("size"));

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
        NoGil(), py::arg("users"), py::arg("names"), py::arg("segments"), py::arg("seen_offsets"), py::arg("counts"),
        py::arg("seen"), py::arg("negatives"), py::arg("logq"), py::arg("cells"), py::arg("cumulative"),
        py::arg("seen_weights"), py::kw_only(), py::arg("rows"), py::arg("num_users"), py::arg("positions"),
        py::arg("first_row"), py::arg("count"), py::arg("num_items"), py::arg("wide"), py::arg("shared"),
        py::arg("seed"), py::arg("stream"), py::arg("step"));

    // begins, ends: what windows show of each user. seen_offsets, counts and seen are 0 if batches sort for themselves;
    // cells and what belongs to them for uniform negatives; target_shares without in-batch negatives.
    py::class_<EpochBatches>(m, "EpochBatches")
        .def(py::init([](uintptr_t offsets, uintptr_t begins, uintptr_t ends, uintptr_t items, uintptr_t starts,
                         uintptr_t owners, uintptr_t seen_offsets, uintptr_t counts, uintptr_t seen, uintptr_t cells,
                         uintptr_t cumulative, uintptr_t seen_weights, uintptr_t target_shares, int64_t num_users,
                         int64_t events, int64_t num_items, bool wide, int64_t batch_size, int64_t rank,
                         int64_t world_size, int window, int64_t max_length, int64_t stride, bool last_target,
                         int64_t negatives, int64_t shared_negatives, uint64_t seed, uint64_t stream,
                         uint64_t order_stream) {
                 EpochBatches domain;
                 domain.shown = {pointer<const int64_t>(begins), pointer<const int64_t>(ends),
                                 pointer<const void>(items), wide};
                 domain.whole = as_sequences(offsets, items, wide);
                 domain.starts = pointer<const int64_t>(starts);
                 domain.owners = pointer<const int64_t>(owners);
                 domain.num_users = num_users;
                 domain.windows = domain.starts[num_users];
                 domain.events = events;
                 domain.batch_size = batch_size;
                 domain.rank = rank;
                 domain.world_size = world_size;
                 domain.window = Window(window);
                 domain.max_length = max_length;
                 domain.stride = stride;
                 domain.last_target = last_target;
                 domain.seed = seed;
                 domain.stream = stream;
                 domain.order_stream = order_stream;
                 domain.num_items = num_items;
                 domain.negatives = negatives;
                 domain.shared_negatives = shared_negatives;
                 domain.seen_offsets = pointer<const int64_t>(seen_offsets);
                 domain.seen_counts = pointer<const int64_t>(counts);
                 domain.seen = pointer<const void>(seen);
                 domain.popularity = {pointer<const AliasCell>(cells), pointer<const int64_t>(cumulative),
                                      pointer<const int64_t>(seen_weights)};
                 domain.target_shares = pointer<const double>(target_shares);
                 return domain;
             }),
             py::kw_only(), py::arg("offsets"), py::arg("begins"), py::arg("ends"), py::arg("items"), py::arg("starts"),
             py::arg("owners"), py::arg("seen_offsets"), py::arg("counts"), py::arg("seen"), py::arg("cells"),
             py::arg("cumulative"), py::arg("seen_weights"), py::arg("target_shares"), py::arg("num_users"),
             py::arg("events"), py::arg("num_items"), py::arg("wide"), py::arg("batch_size"), py::arg("rank"),
             py::arg("world_size"), py::arg("window"), py::arg("max_length"), py::arg("stride"), py::arg("last_target"),
             py::arg("negatives"), py::arg("shared_negatives"), py::arg("seed"), py::arg("stream"),
             py::arg("order_stream"));

    // sizes: four to a domain, those of its parts of windows: users, offsets, items, targets. draws: its negatives.
    py::class_<BatchPlan>(m, "BatchPlan")
        .def(py::init<std::vector<const EpochBatches*>, std::vector<int64_t>>(), NoGil())
        .def_property_readonly("sizes",
                               [](const BatchPlan& plan) {
                                   std::vector<int64_t> all;
                                   for (const EpochBatches::Sizes& s : plan.sizes()) {
                                       all.insert(all.end(), {s.users, s.offsets, s.items, s.targets});
                                   }
                                   return all;
                               })
        .def_property_readonly("draws",
                               [](const BatchPlan& plan) {
                                   std::vector<int64_t> all;
                                   for (const EpochBatches::Sizes& s : plan.sizes()) all.push_back(s.negatives);
                                   return all;
                               })
        .def(
            "fill",
            [](const BatchPlan& plan, uintptr_t windows, uintptr_t negatives, uintptr_t logq) {
                plan.fill(pointer<int64_t>(windows), pointer<int64_t>(negatives), pointer<float>(logq));
            },
            NoGil());
    m.def("limit_threads", [](int count) {  // of the calling thread
#if defined(_OPENMP)
        omp_set_num_threads(count);
#else
        (void)count;
#endif
    });
}

}  // namespace metarec
