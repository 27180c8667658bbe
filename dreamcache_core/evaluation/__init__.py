"""Measure what the method brings: DreamBench, and the demo world."""
