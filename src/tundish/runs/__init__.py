"""Runs: records, reading a run back, and the supervisor that takes it through its stages."""
