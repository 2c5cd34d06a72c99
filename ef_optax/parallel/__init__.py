"""From one worker's transformation to all workers: inference, the lift, simulation, gradients."""
