"""Building a synthetic training set: captions, images, masks, quality."""
