"""Arithmetic only: what a configuration needs and how fast it would be. Never imports torch."""
