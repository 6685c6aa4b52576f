"""The served checkpoint, and what it is held against before it is called done."""
