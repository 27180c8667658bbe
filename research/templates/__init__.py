"""The shipped workflows, one short function each."""
