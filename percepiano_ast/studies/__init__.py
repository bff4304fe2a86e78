"""Studies of trained models: attribution, sensitivity, reports."""
