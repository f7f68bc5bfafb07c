"""Exact changes to the models of the Stable Diffusion family, found by structure: names differ between converters."""
