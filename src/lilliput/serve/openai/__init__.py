"""OpenAI's API over the engine: what is asked (protocol), how it is answered (chat, completions, responses, embeddings), how it fails (errors)."""
