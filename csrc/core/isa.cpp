#include "core/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace metarec {

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::avx512_vnni:
            return "avx512_vnni";
        case Isa::avx512:
            return "avx512";
        case Isa::avx2:
            return "avx2";
        default:
            return "baseline";
    }
}

bool isa_supported(Isa isa) {
#if defined(__x86_64__)
    switch (isa) {
        case Isa::avx512_vnni:
            return isa_supported(Isa::avx512) && __builtin_cpu_supports("avx512vnni");
        case Isa::avx512:
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        case Isa::avx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        default:
            return true;
    }
#else
    return isa == Isa::baseline;
#endif
}

namespace {

constexpr Isa kFastestFirst[] = {Isa::avx512_vnni, Isa::avx512, Isa::avx2, Isa::baseline};

Isa choose() {
    const char* forced = std::getenv("METAREC_FAST_ISA");
    if (forced == nullptr || *forced == '\0') {
        for (Isa isa : kFastestFirst) {
            if (isa_supported(isa)) return isa;
        }
    }
    std::string usable;
    for (Isa isa : kFastestFirst) {
        if (!isa_supported(isa)) continue;
        if (forced != nullptr && std::string(forced) == isa_name(isa)) return isa;
        usable += usable.empty() ? isa_name(isa) : std::string(", ") + isa_name(isa);
    }
    throw std::invalid_argument("METAREC_FAST_ISA must be one of {" + usable + "} on this processor, got '" +
                                std::string(forced == nullptr ? "" : forced) + "'");
}

}  // namespace

Isa active_isa() {
    static const Isa isa = choose();
    return isa;
}

}  // namespace metarec
