"""One file a family: a trainable module that lowers to edits."""
