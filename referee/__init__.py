"""The referee: everything about a run that an idea must not touch."""
