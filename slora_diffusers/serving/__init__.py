"""Mixed-adapter batches behind HTTP: every request of a batch has adapters of its own."""
