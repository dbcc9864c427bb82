"""Side by side with HAProxy, nginx and Envoy: what a connection, a round trip, a gigabyte and an idle session cost."""
