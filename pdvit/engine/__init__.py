"""One loop for every task; it has never heard of patches, losses or models."""
