"""Pretrained encoders that others measure with: CLIP (texts and images) and DINO (images), for retrieval and for scores.

Small, frozen and in float32. Weights are read from the files that are published, and never unpickled.
"""
