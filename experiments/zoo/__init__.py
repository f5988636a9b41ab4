"""Recipe of the embedded model pairs."""
