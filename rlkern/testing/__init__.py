"""What tests and benches of any op need: error budgets, the list of kernels, cross-compilation."""
