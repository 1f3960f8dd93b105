"""Measure what the project promises: `make bench` works on copies in build/bench/ and writes build/bench.json."""
