"""From one worker to all."""
