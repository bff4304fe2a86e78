"""Notes, scores, features of performances, and synthesis: no model."""
