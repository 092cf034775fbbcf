"""Hardened implementations of the patterns, one module each, to import in a service."""
