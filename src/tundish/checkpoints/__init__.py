"""Checkpoints: reading them without running their code, writing them, and the folder that keeps them."""
