"""Microbenchmarks: every op against its physical limit and its peers, interleaved in one run."""
