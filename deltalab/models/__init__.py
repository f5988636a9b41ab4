"""Specs that open as a `ModelPair`: timm, CLIP and Hugging Face pairs, and the embedded ones.

`hub` finds files, `facts` and `vocabulary` what is known of them before anything is loaded.
"""
