"""Rule files: text to an immutable `Config`, every error with its place."""
