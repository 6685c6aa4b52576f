"""What a step of training is made of, beside the loss."""
