"""Files that are written whole, and the cache that finds results again by their content.

These names are public; the modules that they come from are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ovforge._exports import lazy

if TYPE_CHECKING:
    from ovforge.store.cache import Cache, CacheWarning, Entry
    from ovforge.store.digests import digest_file, fingerprint
    from ovforge.store.documents import parse_json, parse_object, parse_toml
    from ovforge.store.files import atomic_file, atomic_folder, atomic_write, sync_folder
    from ovforge.store.folders import check_apart, check_replaceable
    from ovforge.store.processes import end_with_parent, run_program, run_python
    from ovforge.store.tables import csv_table
    from ovforge.store.temporary import scratch_folder

__all__ = [
    "Cache",
    "CacheWarning",
    "Entry",
    "atomic_file",
    "atomic_folder",
    "atomic_write",
    "check_apart",
    "check_replaceable",
    "csv_table",
    "digest_file",
    "end_with_parent",
    "fingerprint",
    "parse_json",
    "parse_object",
    "parse_toml",
    "run_program",
    "run_python",
    "scratch_folder",
    "sync_folder",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "cache": ["Cache", "CacheWarning", "Entry"],
        "digests": ["digest_file", "fingerprint"],
        "documents": ["parse_json", "parse_object", "parse_toml"],
        "files": ["atomic_file", "atomic_folder", "atomic_write", "sync_folder"],
        "folders": ["check_apart", "check_replaceable"],
        "processes": ["end_with_parent", "run_program", "run_python"],
        "tables": ["csv_table"],
        "temporary": ["scratch_folder"],
    },
)
