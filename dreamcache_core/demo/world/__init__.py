"""The world of drawn subjects and scenes that the demo model knows."""
