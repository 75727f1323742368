"""One folder per op; the public functions are re-exported by `rlkern`."""
