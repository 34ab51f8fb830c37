"""The device that a rank computes on, and its memory."""
