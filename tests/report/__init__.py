"""Tests of `fundus_jax.report`."""
