"""A GPT trainer whose memory behaviour is the one the planner models."""
