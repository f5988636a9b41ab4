"""`experiment=visionfuse`: two encoders before one language model whose fine-tunes are merged."""
