"""Object detection: RT-DETR, D-FINE, and ready models with a description of their outputs. Listing it imports nothing heavy."""
