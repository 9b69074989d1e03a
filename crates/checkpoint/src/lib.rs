//! Checkpoints on disk: safetensors, configs, tensor names, tokenizers.
