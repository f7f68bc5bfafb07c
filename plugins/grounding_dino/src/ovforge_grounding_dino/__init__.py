"""GroundingDINO: detection by text. Listing it imports nothing heavy."""
