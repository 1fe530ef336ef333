"""Tests of `fundus_jax.evaluation`."""
