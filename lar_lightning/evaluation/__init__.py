"""Comparing methods on held-out tasks in the same engine: scores, horizons, wall clock, agreement."""
