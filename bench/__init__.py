"""Demonstration and benchmarks of fused_dals; run ``python -m bench --help``."""
