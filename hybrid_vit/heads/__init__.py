"""Decoders over a backbone's feature pyramid, one file each; `registry.py` has them by name."""
