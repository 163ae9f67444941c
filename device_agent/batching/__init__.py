"""Dynamic batching: a pure policy and its asyncio shell."""
