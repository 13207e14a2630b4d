"""Messages where memory runs out, for `common.errors.within_memory`."""

BATCHES = "out of memory: take a smaller --tokens_per_batch, or --device cpu"
SYSTEMS = "out of memory: take --device cpu, or a machine with more memory"
