"""What a run is to do, as values: pure, and light to import."""
