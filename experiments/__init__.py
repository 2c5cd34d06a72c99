"""Training runs that compare compressed training with plain SGD; start with `train.py`."""
