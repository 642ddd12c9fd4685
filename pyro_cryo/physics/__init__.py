"""Image formation as pure functions on tensors: no Pyro, no files, no state."""
