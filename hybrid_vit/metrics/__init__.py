"""Measures of dense predictions, in NumPy: sums that add up over pictures, batches and hosts."""
