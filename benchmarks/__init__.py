"""Measurements of this package, and of what else does the same work."""
