// Which instruction set runs: detected once, or forced by METAREC_FAST_ISA.
#pragma once

namespace metarec {

enum class Isa { baseline, avx2, avx512, avx512_vnni };

bool isa_supported(Isa isa);  // built into this library and usable on this processor
const char* isa_name(Isa isa);
Isa active_isa();  // throws std::runtime_error if METAREC_FAST_ISA names an unknown or unsupported one

}  // namespace metarec

// METAREC_KERNEL declares a kernel for every instruction set; METAREC_DISPATCH(name) is the one that runs.
#if defined(__x86_64__)
#define METAREC_KERNEL(...)          \
    namespace metarec::baseline {    \
    __VA_ARGS__;                     \
    }                                \
    namespace metarec::avx2 {        \
    __VA_ARGS__;                     \
    }                                \
    namespace metarec::avx512 {      \
    __VA_ARGS__;                     \
    }                                \
    namespace metarec::avx512_vnni { \
    __VA_ARGS__;                     \
    }
#define METAREC_DISPATCH(name)                                                              \
    (::metarec::active_isa() == ::metarec::Isa::avx512_vnni ? &::metarec::avx512_vnni::name \
     : ::metarec::active_isa() == ::metarec::Isa::avx512    ? &::metarec::avx512::name      \
     : ::metarec::active_isa() == ::metarec::Isa::avx2      ? &::metarec::avx2::name        \
                                                            : &::metarec::baseline::name)
#else
#define METAREC_KERNEL(...)       \
    namespace metarec::baseline { \
    __VA_ARGS__;                  \
    }
#define METAREC_DISPATCH(name) (&::metarec::baseline::name)
#endif
