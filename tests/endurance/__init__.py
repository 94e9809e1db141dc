"""What takes too long for the suite: a person runs these, and `tests/test_endurance.py` a little of each."""
