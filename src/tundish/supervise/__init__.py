"""The process that takes a run through its stages."""
