"""What a person talks to: the command line, the HTTP service, and the engine process behind it."""
