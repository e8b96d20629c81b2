"""Training: the training loop, distillation, text augmentation and quantization-aware training."""
