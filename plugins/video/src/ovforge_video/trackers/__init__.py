"""Trackers: each follows the things of one stream. Importing this package costs nothing."""
