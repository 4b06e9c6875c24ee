"""OpenAI's protocol: chat completions, completions and models, answered from a tenant's memory."""
