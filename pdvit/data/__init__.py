"""Images in, batches out: sources, loaders, augmentation and patch-aligned mixing."""
