"""The loss between teacher and student, row by row (paper 3.3; algorithm 3)."""
