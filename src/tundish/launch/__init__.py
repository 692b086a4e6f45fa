"""Launching: the composer launcher with the right command, environment and logs."""
