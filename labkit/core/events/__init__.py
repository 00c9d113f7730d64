"""The event log: event types, the log, and what is folded from it."""
