"""Comparing methods on held-out tasks in the same engine."""
