"""The event log: event types, the log, and what is computed from it."""
