"""The federation: what clients train, what the server analyses and merges."""
