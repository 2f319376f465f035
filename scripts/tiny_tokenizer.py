"""A tokenizer of letters for small random pipelines, built offline."""

from transformers import CLIPTokenizer

MAX_TOKENS = 16


def tiny_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Reads letters; longer captions than 14 letters are cut."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "!", "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=MAX_TOKENS, pad_token=pad_token)
