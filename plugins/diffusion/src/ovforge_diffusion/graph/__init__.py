"""Exact changes to diffusion models, found by structure: names differ between converters."""
