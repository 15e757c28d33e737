"""The kernel sources, as package data."""
