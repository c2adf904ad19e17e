"""Any bytes at all, to everything that takes bytes from a stranger.

    python tests/fuzz [TARGET…] [--seconds 60 | --executions 10000000] [--seed 1]

`codec`, `session` and `pair` are C under libFuzzer with the address and undefined-behaviour sanitizers, judged by
`tests/c/oracle.c`; they need clang and its runtime. `frames` (codec and session against the independent decoder of
`tests/frames.py`), `provider` (a running one) and `channel` (with a hostile server) are Python, by `mutation.py`. With
`--executions` a run goes on from where it was stopped, as long as what it tries is the same. Corpus and state are in
.fuzz; what is worth keeping is in tests/fuzz/corpus; each finding is a test.
"""
