"""What both script families need: flags, ranks and devices, atomic files, logging."""
