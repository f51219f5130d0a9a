"""Text for many clients at once, over HTTP, as OpenAI's clients expect it."""
