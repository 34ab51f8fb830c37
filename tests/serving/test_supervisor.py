"""How often the supervisor restarts ranks."""
