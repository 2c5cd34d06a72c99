"""Training runs that compare compressed training with plain SGD; `train.py` is the story."""
