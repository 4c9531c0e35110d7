"""Serve text from a model: completion, request queue, OpenAI's API, and a page."""
