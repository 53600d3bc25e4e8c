"""Sequences of executions in free order: their memory move by move, and the walks over them."""
