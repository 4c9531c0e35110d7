"""Generate token ids from a model: decoder with a cache, generator, sampling. It knows no tokenizer."""
