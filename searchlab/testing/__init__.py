"""Conformance suites to inherit: one class per protocol, one module per class."""
