"""The OpenAI-shaped routes: bodies, answers and chunks as the official clients expect them, over the same service."""
