"""The ClientApp: an owner of data."""

from fedproxy.deployment.flower.app import client

__all__ = ["client"]
