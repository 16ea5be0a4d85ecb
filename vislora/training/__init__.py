"""What every training script needs: randomness, checkpoints, run folders, telemetry."""
