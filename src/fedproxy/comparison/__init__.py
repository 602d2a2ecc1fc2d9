"""Methods compared on the same work."""
