"""A small latent consistency model (Luo et al. 2023) that ships with ovforge, for demos and tests without a download.

Its scheduler is in the distribution ovforge-schedulers, which this one depends upon.
"""

from __future__ import annotations

__all__ = ["EMBEDDED_MODEL"]

EMBEDDED_MODEL = "package:ovforge_lcm/model"
"""What a config's `load.source` says for the embedded model."""
