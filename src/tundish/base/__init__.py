"""What all parts stand on: files, processes, text; nothing of training."""
