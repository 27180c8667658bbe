"""Readers: every form of a training set becomes a ``PairSource``."""
