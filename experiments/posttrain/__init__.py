"""Post-training of any Hugging Face language model: supervised on answers, or by preferences."""
