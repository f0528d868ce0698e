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

// Ids of items: int32 or int64.
struct Ids {
    Ids(const Span& span, const char* name)
        : wide(span.is_wide<int64_t, int32_t>(name)), size(span.size), data(span.data) {}
    bool wide;
    int64_t size;
    void* data;
};

// Sequences of users whose items are checked apart.
Sequences as_sequences(const Span& offsets, int64_t num_users) {
    check_at_least("the number of offsets", offsets.size, 1);
    const auto* const begins = offsets.of<const int64_t>("offsets", {num_users + 1});
    return {begins, begins + 1, nullptr, false};
}

Sequences as_sequences(const Span& offsets, const Ids& items, int64_t num_users) {
    Sequences data = as_sequences(offsets, num_users);
    data.items = items.data, data.wide = items.wide;
    return data;
}

void check_seen(const int64_t* users, int64_t rows, const int64_t* seen_offsets, const int64_t* counts, int64_t size) {
    for (int64_t b = 0; b < rows; ++b) {
        const int64_t u = users == nullptr ? b : users[b];
        if (seen_offsets[u] < 0 || counts[u] < 0 || seen_offsets[u] > size || counts[u] > size - seen_offsets[u]) {
            throw std::invalid_argument("seen items of user " + std::to_string(u) + " must lie in the " +
                                        std::to_string(size) + " given, got " + std::to_string(counts[u]) + " from " +
                                        std::to_string(seen_offsets[u]) + " on");
        }
    }
}

void check_rows(const int64_t* rows, int64_t count, int64_t num_users) {
    for (int64_t b = 0; b < count; ++b) {
        if (rows[b] < 0 || rows[b] >= num_users) {
            throw std::invalid_argument("rows must be in [0, " + std::to_string(num_users) + "), got " +
                                        std::to_string(rows[b]));
        }
    }
}

Popularity as_popularity(const Span& cells, const Span& cumulative, const Span& seen_weights, int64_t num_items,
                         int64_t num_users) {
    if (cells.given != cumulative.given || (seen_weights.given && !cells.given)) {
        throw std::invalid_argument("cells, cumulative and seen weights go together");
    }
    return {cells.maybe<const AliasCell>("cells", {num_items}),
            cumulative.maybe<const int64_t>("cumulative", {num_items + 1}),
            seen_weights.maybe<const int64_t>("seen weights", {num_users})};
}

EpochBatches epoch_batches(const Span& offsets, const Span& begins, const Span& ends, const Span& items_given,
                           const Span& starts, const Span& owners, const Span& seen_offsets, const Span& counts,
                           const Span& seen, const Span& cells, const Span& cumulative, const Span& seen_weights,
                           const Span& target_shares, int64_t num_users, int64_t num_items, int64_t batch_size,
                           int64_t rank, int64_t world_size, int window, int64_t max_length, int64_t stride,
                           bool last_target, int64_t negatives, int64_t shared_negatives, uint64_t seed,
                           uint64_t stream, uint64_t order_stream) {
    const Ids items(items_given, "items");
    check_at_least("num_items", num_items, 1);
    check_at_least("batch_size", batch_size, 1);
    check_at_least("world_size", world_size, 1);
    check_at_least("rank", rank, 0);
    check_at_least("max_length", max_length, 1);
    check_at_least("stride", stride, 1);
    check_at_least("negatives", negatives, 0);
    check_at_least("shared_negatives", shared_negatives, 0);
    if (rank >= world_size || window < 0 || window > 2) {
        throw std::invalid_argument("rank must be below world_size and window in 0..2, got rank " +
                                    std::to_string(rank) + " and window " + std::to_string(window));
    }
    EpochBatches domain;
    domain.whole = as_sequences(offsets, items, num_users);
    domain.shown = {begins.of<const int64_t>("begins", {num_users}), ends.of<const int64_t>("ends", {num_users}),
                    items.data, items.wide};
    domain.starts = starts.of<const int64_t>("starts", {num_users + 1});
    domain.num_users = num_users;
    domain.windows = domain.starts[num_users];
    check_at_least("the number of windows", domain.windows, 1);
    check_offsets(domain.starts, num_users, domain.windows);
    domain.owners = owners.maybe<const int64_t>("owners", {domain.windows});
    if (domain.owners != nullptr) check_rows(domain.owners, domain.windows, num_users);
    domain.events = items.size;
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
    domain.seen_offsets = seen_offsets.maybe<const int64_t>("seen offsets", {num_users + 1});
    domain.seen_counts = counts.maybe<const int64_t>("counts", {num_users});
    if (seen_offsets.given) {
        const bool wide = num_items > int64_t(1) << 31;
        check_seen(nullptr, num_users, domain.seen_offsets, counts.of<const int64_t>("counts", {num_users}), seen.size);
        domain.seen = wide ? static_cast<const void*>(seen.of<const int64_t>("seen", {seen.size}))
                           : seen.of<const int32_t>("seen", {seen.size});
    } else {
        domain.seen = nullptr;
    }
    domain.popularity = as_popularity(cells, cumulative, seen_weights, num_items, num_users);
    if (cells.given && negatives > 0 && seen_offsets.given && !seen_weights.given) {
        throw std::invalid_argument("seen weights must be given beside cells and seen items");
    }
    domain.target_shares = target_shares.maybe<const double>("target_shares", {num_items});
    return domain;
}

}  // namespace

void bind_sampler(py::module_& m) {
    m.def("philox", [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
        const PhiloxBlock block = philox(c0, c1, c2, c3, k0, k1);
        return py::make_tuple(block.word[0], block.word[1], block.word[2], block.word[3]);
    });

    m.def(
        "epoch_order",
        [](const Span& out, int64_t size, int64_t first, int64_t count, uint64_t seed, uint64_t stream, int64_t epoch) {
            check_at_least("size", size, 1);
            if (first < 0 || count < 0 || first > size || count > size - first) {
                throw std::invalid_argument("entries must lie in [0, " + std::to_string(size) + "), got " +
                                            std::to_string(count) + " from " + std::to_string(first) + " on");
            }
            METAREC_DISPATCH(epoch_order)(checked_randomness(seed, stream, epoch, Purpose::permutation), size, first,
                                          count, out.of<int64_t>("out", {count}));
        },
        NoGil(), py::arg("out"), py::kw_only(), py::arg("size"), py::arg("first"), py::arg("count"), py::arg("seed"),
        py::arg("stream"), py::arg("epoch"));

    // index: None unless windows slide.
    m.def(
        "plan_windows",
        [](const Span& offsets, const Span& users, const Span& index, const Span& begins, const Span& packed,
           int64_t num_users, int64_t events, int64_t rows, int64_t first_row, int window, int64_t max_length,
           int64_t stride, uint64_t seed, uint64_t stream, int64_t step) {
            const Randomness random = checked_randomness(seed, stream, step, Purpose::crop);
            const Sequences data = as_sequences(offsets, num_users);
            const auto* user = users.of<const int64_t>("rows", {rows});
            const auto* of_user = index.maybe<const int64_t>("window_index", {rows});
            auto* to = packed.of<int64_t>("packed", {rows + 1});
            check_at_least("max_length", max_length, 1);
            check_at_least("stride", stride, 1);
            if (window < 0 || window > 2 || (Window(window) == Window::sliding) != (of_user != nullptr)) {
                throw std::invalid_argument("window must be in 0..2, with an index where windows slide and only there");
            }
            for (int64_t b = 0; of_user != nullptr && b < rows; ++b) check_at_least("window_index", of_user[b], 0);
            check_first_row(first_row, rows);
            check_users(user, rows, data, num_users, events);
            plan_windows(data, user, of_user, rows, first_row, Window(window), max_length, stride, random,
                         begins.of<int64_t>("begins", {rows}), to);
            return to[rows];
        },
        NoGil(), py::arg("offsets"), py::arg("users"), py::arg("index"), py::arg("begins"), py::arg("packed"),
        py::kw_only(), py::arg("num_users"), py::arg("events"), py::arg("rows"), py::arg("first_row"),
        py::arg("window"), py::arg("max_length"), py::arg("stride"), py::arg("seed"), py::arg("stream"),
        py::arg("step"));

    m.def(
        "copy_windows",
        [](const Span& items, const Span& begins, const Span& packed, const Span& inputs, const Span& targets,
           int64_t rows) {
            const Ids from(items, "items");
            const auto* first = begins.of<const int64_t>("begins", {rows});
            const auto* at = checked_offsets(packed, "packed", rows, inputs.size);
            for (int64_t b = 0; b < rows; ++b) {  // a window has a target after its last input; begins are prefetched
                const int64_t length = at[b + 1] - at[b], room = from.size - (length > 0);
                if (first[b] < 0 || first[b] > room || length > room - first[b]) {
                    throw std::invalid_argument("windows must lie in the " + std::to_string(from.size) +
                                                " items, got one of " + std::to_string(length) + " inputs from " +
                                                std::to_string(first[b]) + " on");
                }
            }
            copy_windows({nullptr, nullptr, from.data, from.wide}, first, at, rows,
                         inputs.of<int64_t>("inputs", {inputs.size}), targets.of<int64_t>("targets", {inputs.size}));
        },
        NoGil(), py::arg("items"), py::arg("begins"), py::arg("packed"), py::arg("inputs"), py::arg("targets"),
        py::kw_only(), py::arg("rows"));

    // values of 8 bytes or of 4, as integers.
    m.def(
        "pad_rows",
        [](const Span& values, const Span& offsets, const Span& out, int64_t rows, int64_t positions, int64_t length,
           int64_t count, bool left, int64_t fill) {
            const auto* const bounds = checked_offsets(offsets, "offsets", rows, positions);
            const Side side = left ? Side::left : Side::right;
            check_at_least("length", length, 0);
            if (values.is_wide<int64_t, int32_t>("values")) {
                pad_rows(values.of<const int64_t>("values", {positions, count}), bounds, rows, length, count, side,
                         fill, out.of<int64_t>("out", {rows, length, count}));
            } else {
                pad_rows(values.of<const int32_t>("values", {positions, count}), bounds, rows, length, count, side,
                         int32_t(fill), out.of<int32_t>("out", {rows, length, count}));
            }
        },
        NoGil(), py::arg("values"), py::arg("offsets"), py::arg("out"), py::kw_only(), py::arg("rows"),
        py::arg("positions"), py::arg("length"), py::arg("count"), py::arg("left"), py::arg("fill"));

    m.def(
        "row_lengths",
        [](const Span& offsets, const Span& users, const Span& seen_offsets, int64_t num_users, int64_t events,
           int64_t rows) {
            const Sequences data = as_sequences(offsets, num_users);
            const auto* user = users.of<const int64_t>("rows", {rows});
            auto* to = seen_offsets.of<int64_t>("seen offsets", {rows + 1});
            check_users(user, rows, data, num_users, events);
            row_lengths(data, user, rows, to);
            return to[rows];
        },
        NoGil(), py::arg("offsets"), py::arg("users"), py::arg("seen_offsets"), py::kw_only(), py::arg("num_users"),
        py::arg("events"), py::arg("rows"));

    m.def(
        "sorted_items",
        [](const Span& offsets, const Span& items, const Span& users, const Span& seen_offsets, const Span& seen,
           const Span& counts, int64_t num_users, int64_t rows, int64_t num_items) {
            const Ids from(items, "items"), to(seen, "seen");
            const Sequences data = as_sequences(offsets, from, num_users);
            const auto* user = users.of<const int64_t>("rows", {rows});
            const auto* at = checked_offsets(seen_offsets, "seen offsets", rows, to.size);
            check_users(user, rows, data, num_users, from.size);
            for (int64_t b = 0; b < rows; ++b) {
                if (at[b + 1] - at[b] != data.ends[user[b]] - data.begins[user[b]]) {
                    throw std::invalid_argument("seen offsets must be those of row_lengths, got another length of " +
                                                std::to_string(user[b]));
                }
            }
            if (!to.wide && num_items > int64_t(1) << 31) {
                throw pybind11::type_error("seen must have elements of type i8 for more than 2**31 items, got i4");
            }
            const int64_t bad =
                sorted_items(data, user, rows, num_items, to.wide, at, to.data, counts.of<int64_t>("counts", {rows}));
            if (bad >= 0) {
                throw std::invalid_argument("items must be in [0, " + std::to_string(num_items) + "), but row " +
                                            std::to_string(user[bad]) + " holds one that is not");
            }
        },
        NoGil(), py::arg("offsets"), py::arg("items"), py::arg("users"), py::arg("seen_offsets"), py::arg("seen"),
        py::arg("counts"), py::kw_only(), py::arg("num_users"), py::arg("rows"), py::arg("num_items"));

    m.def(
        "row_weights",
        [](const Span& seen_offsets, const Span& counts, const Span& seen, const Span& cumulative, const Span& weights,
           int64_t rows) {
            const auto* at = seen_offsets.of<const int64_t>("seen offsets", {rows + 1});
            const auto* count = counts.of<const int64_t>("counts", {rows});
            const auto* item = seen.of<const int32_t>("seen", {seen.size});
            check_seen(nullptr, rows, at, count, seen.size);
            for (int64_t b = 0; b < rows; ++b) {
                for (int64_t i = at[b]; i < at[b] + count[b]; ++i) {
                    if (item[i] < 0 || item[i] + 1 >= cumulative.size) {
                        throw std::invalid_argument("seen items must be in [0, " + std::to_string(cumulative.size - 1) +
                                                    "), got " + std::to_string(item[i]));
                    }
                }
            }
            row_weights(at, count, item, rows, cumulative.of<const int64_t>("cumulative", {cumulative.size}),
                        weights.of<int64_t>("weights", {rows}));
        },
        NoGil(), py::arg("seen_offsets"), py::arg("counts"), py::arg("seen"), py::arg("cumulative"), py::arg("weights"),
        py::kw_only(), py::arg("rows"));

    m.def(
        "build_alias",
        [](const Span& weights, const Span& cells, int64_t size) {
            if (!build_alias(weights.of<const int64_t>("weights", {size}), size,
                             cells.of<AliasCell>("cells", {size}))) {
                throw std::invalid_argument("weights must be non-negative and sum to 2**32 times their number");
            }
        },
        NoGil(), py::arg("weights"), py::arg("cells"), py::kw_only(), py::arg("size"));

    // cells, cumulative and seen_weights are None for uniform negatives.
    m.def(
        "sample_negatives",
        [](const Span& users, const Span& names, const Span& segments, const Span& seen_offsets, const Span& counts,
           const Span& seen, const Span& negatives, const Span& logq, const Span& cells, const Span& cumulative,
           const Span& seen_weights, int64_t rows, int64_t num_users, int64_t positions, int64_t first_row,
           int64_t count, int64_t num_items, bool shared, uint64_t seed, uint64_t stream, int64_t step) {
            const Ids avoided(seen, "seen");
            const auto* user = users.of<const int64_t>("rows", {rows});
            const auto* at = seen_offsets.of<const int64_t>("seen offsets", {num_users + 1});
            const auto* how_many = counts.of<const int64_t>("counts", {num_users});
            const Popularity popularity = as_popularity(cells, cumulative, seen_weights, num_items, num_users);
            check_at_least("num_items", num_items, 1);
            if (cells.given && (!seen_weights.given || avoided.wide)) {
                throw std::invalid_argument("popularity needs seen weights and seen items of 4 bytes");
            }
            check_rows(user, rows, num_users);
            check_seen(user, rows, at, how_many, seen.size);
            draw_negatives(
                {user, segments.of<const int64_t>("segments", {rows + 1}), rows, first_row, count, num_items, at,
                 how_many, avoided.data, avoided.wide,
                 checked_randomness(seed, stream, step, shared ? Purpose::shared : Purpose::negative),
                 negatives.of<int64_t>("negatives", {positions, count}), logq.of<float>("logq", {positions, count})},
                popularity, names.of<const int64_t>("names", {rows}), num_users, positions);
        },
        NoGil(), py::arg("users"), py::arg("names"), py::arg("segments"), py::arg("seen_offsets"), py::arg("counts"),
        py::arg("seen"), py::arg("negatives"), py::arg("logq"), py::arg("cells"), py::arg("cumulative"),
        py::arg("seen_weights"), py::kw_only(), py::arg("rows"), py::arg("num_users"), py::arg("positions"),
        py::arg("first_row"), py::arg("count"), py::arg("num_items"), py::arg("shared"), py::arg("seed"),
        py::arg("stream"), py::arg("step"));

    // begins, ends: what windows show of each user. seen_offsets, counts and seen are None if batches sort for
    // themselves; cells and what belongs to them for uniform negatives; target_shares without in-batch negatives. The
    // arrays belong to the caller, who keeps them as they are.
    py::class_<EpochBatches>(m, "EpochBatches")
        .def(py::init(&epoch_batches), py::kw_only(), py::arg("offsets"), py::arg("begins"), py::arg("ends"),
             py::arg("items"), py::arg("starts"), py::arg("owners"), py::arg("seen_offsets"), py::arg("counts"),
             py::arg("seen"), py::arg("cells"), py::arg("cumulative"), py::arg("seen_weights"),
             py::arg("target_shares"), py::arg("num_users"), py::arg("num_items"), py::arg("batch_size"),
             py::arg("rank"), py::arg("world_size"), py::arg("window"), py::arg("max_length"), py::arg("stride"),
             py::arg("last_target"), py::arg("negatives"), py::arg("shared_negatives"), py::arg("seed"),
             py::arg("stream"), py::arg("order_stream"));

    // sizes: four to a domain, those of its parts of windows: users, offsets, items, targets. draws: its negatives.
    py::class_<BatchPlan>(m, "BatchPlan")
        .def(py::init<std::vector<const EpochBatches*>, std::vector<int64_t>>(), NoGil(), py::keep_alive<1, 2>())
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
            [](const BatchPlan& plan, const Span& windows, const Span& negatives, const Span& logq) {
                int64_t shown = 0, drawn = 0;
                for (const EpochBatches::Sizes& s : plan.sizes()) {
                    shown += s.users + s.offsets + s.items + s.targets, drawn += s.negatives;
                }
                plan.fill(windows.of<int64_t>("windows", {shown}), negatives.of<int64_t>("negatives", {drawn}),
                          logq.of<float>("logq", {drawn}));
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
