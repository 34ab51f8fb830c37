"""Measuring decodes."""
