"""The comparison with diffusers, which all schedulers' tests share."""

from samplers import both as both
