"""Shared by all scripts: flags, ranks and devices, atomic files, logging."""
