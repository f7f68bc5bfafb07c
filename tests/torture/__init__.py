"""Strangers' files, bent in every way: `make torture` runs them for hours, `tests/test_torture.py` a few hundred.

Each case takes a sound file, changes it (its structure or its bytes), and gives it to a command of the program. What
may come out is a result or an error that is explained; a traceback, a crash, a hang or a file left over is a fault.
"""
