"""GPT-2 as published, under the same referee."""
