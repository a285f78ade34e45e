"""Weights on disk and in memory: our checkpoint, safetensors, quantization, LoRA arithmetic, the Hub."""
