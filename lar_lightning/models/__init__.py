"""Teacher and student in one set of weights, and what is read with them alone."""
