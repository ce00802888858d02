"""Data: tasks generated from a seed, prepared data sets, and the loading of both."""
