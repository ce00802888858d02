"""Context parallelism as transforms of a pure function. Filled in by strategy files beside this."""
