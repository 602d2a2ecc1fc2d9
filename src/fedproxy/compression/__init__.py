"""Stage one: the LLM becomes the proxy, without the blocks that matter least."""
