"""Sampling methods in numpy: DDIM, Euler, DPM++, UniPC and the others of diffusers, number for number."""
