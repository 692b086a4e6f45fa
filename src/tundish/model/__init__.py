"""The model that a run starts from: its shapes, its folder, its weights."""
