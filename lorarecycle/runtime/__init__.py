"""What every stage stands on: devices, files, seeds, progress, compiled steps."""
