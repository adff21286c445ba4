"""Compiling examples, drawing, writing."""
