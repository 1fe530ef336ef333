"""Fundus-R1 in JAX: a vision-language model that reads fundus images and explains its answer."""

__version__ = "0.1.0"
