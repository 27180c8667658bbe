"""Measurements of the product against what the same job costs written plainly; random weights, nothing is downloaded."""
