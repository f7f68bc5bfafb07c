"""Configs of the models that ship with plugins."""
