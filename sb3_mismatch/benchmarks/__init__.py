"""Benchmarks: ``python -m sb3_mismatch.benchmarks learn ...`` trains, ``... report ...`` makes tables and curves."""
