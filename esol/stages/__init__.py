"""The stages, one file each; whatever stands here is found."""
