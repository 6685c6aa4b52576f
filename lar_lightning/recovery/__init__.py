"""What lets a run that ended at any moment go on."""
