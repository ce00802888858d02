"""What `attnjax plan` does: a training step compiled for devices that aren't there, and counted."""
