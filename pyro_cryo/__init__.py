"""Cryo-EM reconstruction as probabilistic programming."""

__version__ = "0.1.0"
