"""The page to train from, for a browser: `diffray ui`."""
