"""What can be measured, one module for each: a `Config` for tyro and `run(config) -> exit code`."""
