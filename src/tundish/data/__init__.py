"""Data: from the source that an address names to a folder of packed rows (MDS shards)."""
