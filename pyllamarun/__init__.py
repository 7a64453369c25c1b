"""Runs a model that is larger than your GPU, at exactly the VRAM you allow."""

__version__ = "0.1.0"
