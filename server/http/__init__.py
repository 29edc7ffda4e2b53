"""The HTTP dialects over the service: routes, validation, server-sent events, errors and limits."""
