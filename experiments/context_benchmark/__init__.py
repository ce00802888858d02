"""What `attnjax benchmark context_parallel` does: masks by strategies by lengths."""
