"""Parameters and containers of the memories; nothing here knows about Hugging Face."""
