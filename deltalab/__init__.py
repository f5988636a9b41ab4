"""Experiments on delta parameters: edit them, predict the loss change, measure it."""

__version__ = "0.1.0"
