"""The DreamBench protocol (METHOD.md section 8)."""
