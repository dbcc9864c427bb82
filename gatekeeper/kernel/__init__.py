"""What Linux is asked for by system call."""
