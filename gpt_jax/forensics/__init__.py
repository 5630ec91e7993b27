"""Runs that prove themselves: repeat the first steps, keep what a spike looked like, name the first bad number."""
