#include "sequence/linear_scan.h"

#include "core/vec.h"

namespace metarec::METAREC_ISA {
namespace {

constexpr int kMany = 4;       // vectors of channels that go through time together, to hide each other's latency
constexpr int64_t kRun = 128;  // products that are summed before they are added to the sum of the sums before
// Below so many elements, a second thread starts later than one thread ends.
constexpr int64_t kWorthThreads = int64_t{1} << 16;

template <typename T>
struct Vector {
    typedef T type __attribute__((vector_size(METAREC_VECTOR_BYTES)));
};

template <typename V, typename T>
inline V get(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <typename V, typename T>
inline void put(T* p, V v) {
    std::memcpy(p, &v, sizeof v);
}

// Some segments, and the way in which their events are visited.
struct Segments {
    const int64_t* offsets;
    int64_t begin, end;
    bool reverse;

    // Calls work(t, i) for the i-th visited event t of each segment.
    template <typename Work>
    void visit(Work work) const {
        for (int64_t segment = begin; segment < end; ++segment) {
            const int64_t first = offsets[segment], n = offsets[segment + 1] - first;
            for (int64_t i = 0; i < n; ++i) work(reverse ? first + n - 1 - i : first + i, i, n);
        }
    }
};

// The scan of kCount vectors V of channels, from channel d on.
template <typename V, int kCount, typename T>
inline void scan_channels(const T* a, const T* u, T* h, const Segments& segments, int64_t width, int64_t d) {
    constexpr int64_t lanes = sizeof(V) / sizeof(T);
    V a_re[kCount], a_im[kCount], re[kCount], im[kCount];
    for (int j = 0; j < kCount; ++j) {
        a_re[j] = get<V>(a + d + j * lanes);
        a_im[j] = get<V>(a + width + d + j * lanes);
    }
    segments.visit([&](int64_t t, int64_t i, int64_t) {
        const int64_t at = 2 * t * width + d;
        for (int j = 0; j < kCount; ++j) {
            V next_re = get<V>(u + at + j * lanes), next_im = get<V>(u + at + width + j * lanes);
            if (i > 0) {
                next_re = a_re[j] * re[j] + (next_re - a_im[j] * im[j]);
                next_im = a_re[j] * im[j] + (next_im + a_im[j] * re[j]);
            }
            put(h + at + j * lanes, re[j] = next_re);
            put(h + at + width + j * lanes, im[j] = next_im);
        }
    });
}

// The same of the gradients; `segments` are visited against the direction of the scan. sum: [2, D].
template <typename V, int kCount, typename T>
inline void scan_channels_back(const T* a, const T* h, const T* grad_h, T* grad_u, T* sum, const Segments& segments,
                               int64_t width, int64_t d) {
    constexpr int64_t lanes = sizeof(V) / sizeof(T);
    const int64_t before = (segments.reverse ? -2 : 2) * width;
    V a_re[kCount], a_im[kCount], re[kCount], im[kCount], sum_re[kCount], sum_im[kCount];
    for (int j = 0; j < kCount; ++j) {
        a_re[j] = get<V>(a + d + j * lanes);
        a_im[j] = get<V>(a + width + d + j * lanes);
        sum_re[j] = sum_im[j] = V{};
        put(sum + d + j * lanes, V{});
        put(sum + width + d + j * lanes, V{});
    }
    int64_t summed = 0;
    const auto add_up = [&] {
        for (int j = 0; j < kCount; ++j) {
            T* own = sum + d + j * lanes;
            put(own, get<V>(own) + sum_re[j]);
            put(own + width, get<V>(own + width) + sum_im[j]);
            sum_re[j] = sum_im[j] = V{};
        }
        summed = 0;
    };
    segments.visit([&](int64_t t, int64_t i, int64_t n) {
        const int64_t at = 2 * t * width + d;
        for (int j = 0; j < kCount; ++j) {
            V next_re = get<V>(grad_h + at + j * lanes), next_im = get<V>(grad_h + at + width + j * lanes);
            if (i > 0) {
                next_re = a_re[j] * re[j] + (next_re + a_im[j] * im[j]);
                next_im = a_re[j] * im[j] + (next_im - a_im[j] * re[j]);
            }
            put(grad_u + at + j * lanes, re[j] = next_re);
            put(grad_u + at + width + j * lanes, im[j] = next_im);
            if (i + 1 < n) {
                const V h_re = get<V>(h + at + before + j * lanes), h_im = get<V>(h + at + before + width + j * lanes);
                sum_re[j] += next_re * h_re + next_im * h_im;
                sum_im[j] += next_im * h_re - next_re * h_im;
            }
        }
        if (++summed == kRun) add_up();
    });
    add_up();
}

// Calls work(Size<V, count>{}, segments, group, d) for groups of segments and blocks of channels that cover all.
template <typename V, int kCount>
struct Size {
    using type = V;
    static constexpr int count = kCount;
};

template <typename T, typename Work>
inline void for_each_block(const int64_t* offsets, int64_t segments, int64_t width, bool reverse, Work work) {
    using V = typename Vector<T>::type;
    constexpr int64_t lanes = sizeof(V) / sizeof(T), block = kMany * lanes;
    const int64_t blocks = (width + block - 1) / block;
    const bool parallel = 2 * offsets[segments] * width > kWorthThreads;
// dealt out one by one: a single long segment is shared by its channels
#pragma omp parallel for collapse(2) schedule(static, 1) if (parallel)
    for (int64_t group = 0; group < kScanGroups; ++group) {
        for (int64_t b = 0; b < blocks; ++b) {
            const Segments own{offsets, segments * group / kScanGroups, segments * (group + 1) / kScanGroups, reverse};
            const int64_t end = (b + 1) * block < width ? (b + 1) * block : width;
            int64_t d = b * block;
            if (end - d == block) {
                work(Size<V, kMany>{}, own, group, d);
                continue;
            }
            for (; d + lanes <= end; d += lanes) work(Size<V, 1>{}, own, group, d);
            for (; d < end; ++d) work(Size<T, 1>{}, own, group, d);
        }
    }
}

template <typename T>
inline void scan(const T* a, const T* u, const int64_t* offsets, T* h, int64_t segments, int64_t width, bool reverse) {
    for_each_block<T>(offsets, segments, width, reverse, [&](auto size, const Segments& own, int64_t, int64_t d) {
        scan_channels<typename decltype(size)::type, decltype(size)::count>(a, u, h, own, width, d);
    });
}

template <typename T>
inline void scan_back(const T* a, const T* h, const T* grad_h, const int64_t* offsets, T* grad_a, T* grad_u, T* partial,
                      int64_t segments, int64_t width, bool reverse) {
    for_each_block<T>(offsets, segments, width, !reverse,
                      [&](auto size, const Segments& own, int64_t group, int64_t d) {
                          scan_channels_back<typename decltype(size)::type, decltype(size)::count>(
                              a, h, grad_h, grad_u, partial + group * 2 * width, own, width, d);
                      });
    for (int64_t d = 0; d < 2 * width; ++d) {
        grad_a[d] = 0;
        for (int64_t group = 0; group < kScanGroups; ++group) grad_a[d] += partial[group * 2 * width + d];
    }
}

}  // namespace

void linear_scan_f32(const float* a, const float* u, const int64_t* offsets, float* h, int64_t segments, int64_t width,
                     bool reverse) {
    scan(a, u, offsets, h, segments, width, reverse);
}

void linear_scan_f64(const double* a, const double* u, const int64_t* offsets, double* h, int64_t segments,
                     int64_t width, bool reverse) {
    scan(a, u, offsets, h, segments, width, reverse);
}

void linear_scan_backward_f32(const float* a, const float* h, const float* grad_h, const int64_t* offsets,
                              float* grad_a, float* grad_u, float* partial, int64_t segments, int64_t width,
                              bool reverse) {
    scan_back(a, h, grad_h, offsets, grad_a, grad_u, partial, segments, width, reverse);
}

void linear_scan_backward_f64(const double* a, const double* h, const double* grad_h, const int64_t* offsets,
                              double* grad_a, double* grad_u, double* partial, int64_t segments, int64_t width,
                              bool reverse) {
    scan_back(a, h, grad_h, offsets, grad_a, grad_u, partial, segments, width, reverse);
}

}  // namespace metarec::METAREC_ISA
