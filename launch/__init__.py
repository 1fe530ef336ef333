"""Entry points: `run.py` takes a configuration from raw data to an exported model and a report."""
