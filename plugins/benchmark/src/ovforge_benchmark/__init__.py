"""Measures models and pipelines, and compares runs. Listing it imports nothing heavy."""
