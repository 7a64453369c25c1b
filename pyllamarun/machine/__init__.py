"""What this computer has: GPUs through NVML, CPU, memory, disk."""
