// Every domain binds its own operators. Tensors come as addresses: Python has checked them (metarec_fast/ops).
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace metarec {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
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

void bind_bounded_lookup(pybind11::module_& m);
void bind_evaluation(pybind11::module_& m);
void bind_sampler(pybind11::module_& m);
void bind_sequence(pybind11::module_& m);
void bind_train(pybind11::module_& m);
void bind_vq(pybind11::module_& m);

}  // namespace metarec
