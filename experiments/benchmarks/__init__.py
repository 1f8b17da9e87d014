"""Measurements: each module prints one JSON line per case."""
