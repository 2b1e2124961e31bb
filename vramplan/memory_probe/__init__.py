"""Real passes that confirm the estimate."""
