"""The engine and the server beside those that users would pick instead: see README.md in loadtests."""
