"""Sources, shards, splits and batches."""
