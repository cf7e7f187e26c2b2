"""ESOL: image-level labels in, pixel masks and a segmentation model out."""

__version__ = "0.1.0"
