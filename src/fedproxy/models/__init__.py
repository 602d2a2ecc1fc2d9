"""The only part that imports transformers and peft: model families, checkpoints, LoRA adapters, local training."""
