"""What `attnjax compare` does: runs of several mechanisms, side by side on a page."""
