"""Measurements of decodes: `halovae bench` and `halovae validate`."""
