"""Reading checkpoint files without running code from them."""
