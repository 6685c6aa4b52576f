"""A policy's own trajectories, rolled out by one machine or by many."""
