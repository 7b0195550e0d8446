"""Augmentation of training images, in batch and on their device; each image by its own draws."""
