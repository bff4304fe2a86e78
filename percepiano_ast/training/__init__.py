"""Training loops. Batches come in as iterables; nothing here imports grain, tfds or librosa."""
