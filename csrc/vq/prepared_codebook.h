// Owns the arrays of a Codebook, and of its panels in one precision or the other.
#pragma once

#include <memory>

#include "vq/codebook.h"

namespace metarec {

struct FreeAligned {
    void operator()(void* memory) const;
};
using AlignedMemory = std::unique_ptr<void, FreeAligned>;
AlignedMemory allocate_aligned(size_t bytes);

class PreparedCodebook {
  public:
    PreparedCodebook(const float* codebook, int64_t heads, int64_t codes, int64_t dim, int64_t lanes);
    const Codebook& view() const { return view_; }

  private:
    AlignedMemory memory_;
    Codebook view_;
};

class PreparedPanels {
  public:
    PreparedPanels(const Codebook& codebook, bool screen);
    const Panels& view() const { return view_; }

  private:
    AlignedMemory memory_;
    Panels view_;
};

}  // namespace metarec
