"""Labelling every pixel: a timm backbone's feature maps, the heads that read them, and their files."""
