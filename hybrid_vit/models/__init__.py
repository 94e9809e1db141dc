"""Backbones, one file for each architecture, and the table of their names."""
