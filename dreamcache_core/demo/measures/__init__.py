"""What a drawn image shows: the subject, its place and colours, the scene."""
