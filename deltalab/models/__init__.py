"""Specs that open as a `ModelPair`: timm, CLIP and Hugging Face pairs, and the embedded ones.

`live` fills the one module, `hub` finds files, `facts` and `vocabulary` say what is known of them
before anything is loaded.
"""
