"""Measurements: micro-benchmarks, the GPU report, the full-size step, and the tables made from their records."""
