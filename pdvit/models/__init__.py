"""Any timm vision transformer: build it, read its tokens, load and export its weights."""
