"""Specs that open as a `ModelPair`."""
