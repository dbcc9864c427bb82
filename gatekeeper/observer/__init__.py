"""Metrics, audit log, status page."""
