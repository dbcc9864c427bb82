"""What a policy means: pure functions over immutable values."""
