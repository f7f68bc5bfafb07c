"""Encrypted models: read, run and cached without a plain byte on disk."""
