"""What is fitted without an encoder: the regressors."""
