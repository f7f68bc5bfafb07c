"""Errors of the operating system, and what to do about each."""

from __future__ import annotations

import errno
import os

from ovforge.errors import OvforgeError

__all__ = ["system_error"]

_SAFE = "What was there before is still there."
_SPACE = f"{_SAFE} Free some space or choose another place, and run it again."
_RIGHTS = "You may not use it: look at its owner and mode (ls -ld), or choose another place."
_HINTS = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: f"{_SAFE} A limit on the size of files is set (ulimit -f): raise it, or choose another place.",
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: f"{_SAFE} It can only be read: choose another place.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ENOENT: "Look at how it is spelled; a path starts at the current folder, and in a config at the config's.",
    errno.ENOTDIR: "A part of the path is a file: look at how it is spelled.",
    errno.EISDIR: "Name a file in it.",
    errno.EEXIST: "Name another, or remove it first.",
    errno.ELOOP: "It is a link that leads to itself: name the file itself.",
    errno.EMFILE: "Too many files are open: raise the limit (ulimit -n), or run less at a time.",
    errno.ENFILE: "Too many files are open on this machine: run less at a time.",
    errno.ENOMEM: "Free memory, or use a smaller model, picture or batch.",
    errno.EIO: "The disk or the network fails: look at the system's log, and restore the file from a copy.",
    errno.ESTALE: "The network's file system lost it: run it again.",
    errno.ETXTBSY: "A program is running from it: end that first.",
    errno.EXDEV: "It lies on two file systems: choose a place on one.",
}
_OTHERWISE = f"{_SAFE} Look at the path, its owner and the disk, and run it again."


def system_error(error: OSError) -> OvforgeError:
    """Return an error of the system as one that a user can act upon."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    hint = _HINTS.get(error.errno or 0, _OTHERWISE)
    return OvforgeError(error.strerror or str(error), where=" -> ".join(names) or None, hint=hint)
