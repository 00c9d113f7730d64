"""What people start from a cell or a shell."""
