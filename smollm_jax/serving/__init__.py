"""Serve text from a model: completion, request queue, OpenAI's API, and a page."""

NEW_TOKENS, WAITING = 2_048, 16  # defaults of a server: most new tokens of a request, most requests in its queue
