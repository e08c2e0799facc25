"""What makes shards, and what reads them ahead of a step."""
