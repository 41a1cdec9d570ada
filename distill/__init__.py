"""Compile a language model's task circuits into an ordinary dense checkpoint."""

__version__ = "0.1.0"
