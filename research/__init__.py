"""How the demo model was made and measured; not part of the package."""
