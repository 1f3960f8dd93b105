"""Measures what the project promises: `make bench`. Works on copies in build/bench/; writes build/bench.json."""
