"""What Triton kernels of several ops need."""

import os

# The interpreter multiplies the bit patterns of bfloat16 in tl.dot (seen in triton 3.9): kernels
# widen the operands first when it runs them. The products are exact either way.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
