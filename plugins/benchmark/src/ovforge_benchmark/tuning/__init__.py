"""`ovforge tune`: the fastest pipeline that still gives the original's results, found by trying."""
