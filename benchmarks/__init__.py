"""Benchmarks of tundish against the tools that it stands on. They make their data themselves and need no network."""
