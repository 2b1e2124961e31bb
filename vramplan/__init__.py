"""Plan a GPT training run that fits your GPU's memory, then train it."""

__version__ = "0.1.0"
