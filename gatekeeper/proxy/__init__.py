"""One worker: event loop, admission, TCP and UDP sessions, relay."""
