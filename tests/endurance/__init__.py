"""What takes too long for the suite: a person runs it, `test_endurance.py` a little of each."""
