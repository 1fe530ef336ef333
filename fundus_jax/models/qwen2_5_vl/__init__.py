"""Qwen2.5-VL in Flax NNX, equal to Hugging Face's: config, rope, rotary,
vision, text, model, processor, params."""
