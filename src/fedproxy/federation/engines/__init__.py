"""Engines drive the coordinator: they carry orders to clients and replies back, and know nothing of the method."""
