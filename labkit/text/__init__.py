"""Text to token ids and back: tokenizers, streams, grammars."""
