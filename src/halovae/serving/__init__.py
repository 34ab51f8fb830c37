"""A server for videos and pictures: a front process that takes requests, and ranks that generate."""
