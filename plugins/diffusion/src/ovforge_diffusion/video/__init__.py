"""Videos: what the tasks take and give, how latents become frames, and how frames become files."""
