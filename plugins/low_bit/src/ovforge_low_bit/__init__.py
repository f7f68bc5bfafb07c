"""Weights in few bits by methods of the literature, in numpy. Listing it imports nothing heavy."""
