"""Masks: images with a class for every pixel, from digit scenes or folders, and batches of them."""
