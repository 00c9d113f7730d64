"""Where weights come from, and the linear layers they make."""
