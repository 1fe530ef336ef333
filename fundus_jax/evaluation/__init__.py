"""Measures a model on held-out questions: prompts, answer extraction, scores with intervals, reports."""
