"""The ServerApp: the owner of the model."""

from fedproxy.deployment.flower.app import server

__all__ = ["server"]
