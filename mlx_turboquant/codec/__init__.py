"""Vectors to words and back: no model and no kernel."""
