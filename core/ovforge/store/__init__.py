"""Files that are written whole, and the cache that finds results again by their content.

These names are public; the modules that they come from are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ovforge._exports import lazy

if TYPE_CHECKING:
    from ovforge.store.cache import Cache, CacheWarning, Entry
    from ovforge.store.digests import digest_file, fingerprint
    from ovforge.store.files import atomic_folder, atomic_write, sync_folder

__all__ = [
    "Cache",
    "CacheWarning",
    "Entry",
    "atomic_folder",
    "atomic_write",
    "digest_file",
    "fingerprint",
    "sync_folder",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "cache": ["Cache", "CacheWarning", "Entry"],
        "digests": ["digest_file", "fingerprint"],
        "files": ["atomic_folder", "atomic_write", "sync_folder"],
    },
)
