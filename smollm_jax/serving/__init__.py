"""Serve text from a model: completion, request queue, OpenAI's API, and a page."""

# defaults of a server: most new tokens of a request, most requests in its queue, and texts decoded together
NEW_TOKENS, WAITING, SLOTS = 2_048, 16, 8
MOST_SLOTS = 64
