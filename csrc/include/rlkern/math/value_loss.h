// One token of the clipped value loss.
#pragma once

#include "rlkern/macros.h"

namespace rlkern {

struct ValueTerm {
  float error;    // V - R, the gradient where the loss is not clipped
  float squared;  // the larger of the two squared errors
  bool clipped;   // whether it is the clipped one
};

// Selects that a NaN gets through, whichever of the three it is.
RLK_HD ValueTerm value_term(float v, float r, float old, float width) {
  const float low = old - width, high = old + width;
  const float above = v >= low ? v : low, inside = above <= high ? above : high;
  const float error = v - r, other = inside - r;
  const float squared = error * error, clipped = other * other;
  const float larger = clipped > squared ? clipped : squared;
  return {error, clipped <= squared || clipped > squared ? larger : squared + clipped,
          clipped > squared};
}

}  // namespace rlkern
