"""Training of editors: episodes, the training loop, checkpoints."""
