"""Measurements beside Hugging Face in the same process; not shipped."""
