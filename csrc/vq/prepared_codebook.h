// Owns the arrays of a Codebook.
#pragma once

#include <memory>

#include "vq/codebook.h"

namespace metarec {

class PreparedCodebook {
  public:
    PreparedCodebook(const float* codebook, int64_t heads, int64_t codes, int64_t dim, int64_t width);
    const Codebook& view() const { return view_; }

  private:
    struct Free {
        void operator()(void* memory) const;
    };
    std::unique_ptr<void, Free> memory_;
    Codebook view_;
};

}  // namespace metarec
