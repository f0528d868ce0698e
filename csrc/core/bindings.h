// Every domain binds its own operators. Tensors come with their number of elements and their type, and a binding checks
// both against the sizes that it hands to a kernel: no call, whatever its arguments, reads or writes outside a tensor.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace metarec {

// NumPy's name of an element type, without its byte order.
template <typename T>
std::string type_code() {
    using Plain = std::remove_const_t<T>;
    const char kind = std::is_floating_point_v<Plain> ? 'f' : std::is_integral_v<Plain> ? 'i' : 'V';
    return kind + std::to_string(sizeof(Plain));
}

inline std::string join_sizes(std::initializer_list<int64_t> sizes) {
    std::string text;
    for (int64_t size : sizes) text += (text.empty() ? "" : " x ") + std::to_string(size);
    return text;
}

// A contiguous tensor: metarec_fast/ops/_arrays.py makes it of (address, number of elements, type), or of None.
struct Span {
    void* data = nullptr;
    int64_t size = 0;
    std::string type;
    bool given = false;

    // The elements, as many as the product of `sizes`. Throws TypeError for None or another type, ValueError for
    // another number.
    template <typename T>
    T* of(const char* name, std::initializer_list<int64_t> sizes) const {
        if (!given) throw pybind11::type_error(std::string(name) + " must be a tensor, got None");
        if (type != type_code<T>()) {
            throw pybind11::type_error(std::string(name) + " must have elements of type " + type_code<T>() + ", got " +
                                       type);
        }
        int64_t expected = 1;
        bool fits = true;
        for (int64_t n : sizes) fits = n >= 0 && !__builtin_mul_overflow(expected, n, &expected) && fits;
        if (!fits || size != expected) {
            throw std::invalid_argument(std::string(name) + " must have " + join_sizes(sizes) + " elements, got " +
                                        std::to_string(size));
        }
        return static_cast<T*>(data);
    }

    // Whether the elements are the wider of two types: float64 rather than float32, or int64 rather than int32.
    template <typename Wide, typename Narrow>
    bool is_wide(const char* name) const {
        if (!given) throw pybind11::type_error(std::string(name) + " must be a tensor, got None");
        if (type != type_code<Wide>() && type != type_code<Narrow>()) {
            throw pybind11::type_error(std::string(name) + " must have elements of type " + type_code<Narrow>() +
                                       " or " + type_code<Wide>() + ", got " + type);
        }
        return type == type_code<Wide>();
    }

    // As `of`, or null for None.
    template <typename T>
    T* maybe(const char* name, std::initializer_list<int64_t> sizes) const {
        return given ? of<T>(name, sizes) : nullptr;
    }
};

inline void check_at_least(const char* name, int64_t value, int64_t least) {
    if (value < least) {
        throw std::invalid_argument(std::string(name) + " must be at least " + std::to_string(least) + ", got " +
                                    std::to_string(value));
    }
}

// Packed rows: offsets must rise from 0 to rows, or a kernel would read outside its tensors.
inline void check_offsets(const int64_t* offsets, int64_t segments, int64_t rows) {
    bool rising = offsets[0] == 0 && offsets[segments] == rows;
    for (int64_t b = 0; b < segments && rising; ++b) rising = offsets[b] <= offsets[b + 1];
    if (!rising) {
        throw std::invalid_argument("offsets must rise from 0 to the number of rows (" + std::to_string(rows) +
                                    "), got first " + std::to_string(offsets[0]) + ", last " +
                                    std::to_string(offsets[segments]));
    }
}

// The same of a tensor with segments + 1 elements.
inline const int64_t* checked_offsets(const Span& offsets, const char* name, int64_t segments, int64_t rows) {
    check_at_least("the number of offsets", segments + 1, 1);
    const auto* at = offsets.of<const int64_t>(name, {segments + 1});
    check_offsets(at, segments, rows);
    return at;
}

void bind_bounded_lookup(pybind11::module_& m);
void bind_evaluation(pybind11::module_& m);
void bind_sampler(pybind11::module_& m);
void bind_sequence(pybind11::module_& m);
void bind_train(pybind11::module_& m);
void bind_vq(pybind11::module_& m);

}  // namespace metarec

namespace pybind11::detail {

template <>
struct type_caster<metarec::Span> {
    PYBIND11_TYPE_CASTER(metarec::Span, const_name("tuple[int, int, str] | None"));

    bool load(handle source, bool) {
        if (source.is_none()) return true;
        if (!isinstance<tuple>(source) || len(source) != 3) return false;
        const auto parts = reinterpret_borrow<tuple>(source);
        if (!isinstance<int_>(parts[0]) || !isinstance<int_>(parts[1]) || !isinstance<str>(parts[2])) return false;
        value.data = reinterpret_cast<void*>(parts[0].cast<uintptr_t>());
        value.size = parts[1].cast<int64_t>();
        value.type = parts[2].cast<std::string>();
        value.given = true;
        return value.size == 0 || value.data != nullptr;
    }
};

}  // namespace pybind11::detail
