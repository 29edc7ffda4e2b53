"""`stet bench`: measures a running server as its users meet it. Imports nothing of the server that it measures."""
