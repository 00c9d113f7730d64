"""Traces: requests as they arrived somewhere; files of them, recordings, generators."""
