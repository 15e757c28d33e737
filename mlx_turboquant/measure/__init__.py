"""Quality, speed and memory of caches, measured side by side."""
