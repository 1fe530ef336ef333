"""Offline data jobs: published archives in, checked shards of records out (never imports jax or torch)."""
